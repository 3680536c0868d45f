"""overhead_frontier: scores are those of training, stand-ins are counted as used, and the best that fits is named."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import small_config

from benchmarks import overhead_frontier
from benchmarks.frontier import frontier, points, tape
from benchmarks.frontier.frontier import Figure
from benchmarks.frontier.scorers import Proxy, Scorer, counted, overhead
from benchmarks.frontier.settings import Plans, Prior, Setting, estimates, mean_agreement
from benchmarks.frontier.tape import EXACT, Length, Moment
from opus_jax import config as configuration
from opus_jax.models.presets import PRESETS
from opus_jax.training.build import Parts, build
from opus_jax.training.feed import put_rows
from opus_jax.training.scoring import Chooser
from opus_jax.training.state import init_state

STEPS = 6
RANDOM = Scorer(4, place="random", derivative="difference")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> Parts:
    overrides = [
        "selection.audit_every=0", "selection.warm_start_steps=1", "feedback.enabled=true", "feedback.window_steps=2",
        "feedback.clusters=2", "feedback.max_epochs=null", "corpus.row_tokens=64",
    ]  # fmt: skip
    return build(small_config(tmp_path_factory.mktemp("frontier"), *overrides), progress=False)


@pytest.fixture(scope="module")
def moments(parts: Parts) -> list[Moment]:
    length = Length(STEPS, 1, chunk=8, factors_every=3, factors=(RANDOM,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape, "SPREADS", ((16, 4),))
        patch.setattr(tape, "PROXIES", (Proxy(), Proxy(5), Proxy(1, 0.9)))
        return list(tape.record(parts, length))


@pytest.fixture
def start(parts: Parts) -> Any:
    return parts.steering().controller


@pytest.mark.slow
def test_scores_are_those_of_training(parts: Parts, moments: list[Moment]) -> None:
    """The first step's, by the function that the training step calls."""
    state = init_state(parts.spec, parts.optimizer, 0, parts.mesh, directed=True)
    stream, proxies = (tape._stream(parts, split, n) for split, n in (("train", parts.config.candidates), ("proxy", 8)))
    state = tape._trained(parts, state, next(stream))
    rows, proxy = (put_rows(next(source), parts.mesh) for source in (stream, proxies))
    for scorer in (EXACT, Scorer(4, derivative="difference")):
        selection = configuration.replace(parts.config.selection, **scorer.settings(64))
        config = configuration.replace(parts.config, selection=selection)

        def scored(state: Any, rows: Any, proxy: Any, config: Any = config) -> jax.Array:
            chooser = Chooser(parts.spec, parts.optimizer, config, state, rows, proxy)
            return chooser.score(chooser.direction(state.key)[1], state.key)

        with jax.set_mesh(parts.mesh):
            expected = np.asarray(jax.jit(scored)(state, rows, proxy), np.float64)
        assert moments[0].scores[scorer] == pytest.approx(expected, abs=1e-3 * float(np.abs(expected).max()))


@pytest.mark.slow
def test_the_model_moves_and_factors_come_now_and_then(moments: list[Moment]) -> None:
    assert len(moments) == STEPS
    assert not np.allclose(moments[0].scores[EXACT], moments[-1].scores[EXACT])
    assert [RANDOM in moment.scores for moment in moments] == [True, False, False] * 2


@pytest.mark.slow
def test_a_kept_proxy_is_the_old_one(moments: list[Moment]) -> None:
    fresh, kept = Scorer(4, derivative="difference"), Scorer(4, derivative="difference", proxy=Proxy(5))
    same = [np.allclose(moment.scores[fresh], moment.scores[kept]) for moment in moments]
    assert same == [True, False, False, False, False, True]


def test_pieces_lie_evenly_over_the_row() -> None:
    rows = {"tokens": np.arange(2 * 64).reshape(2, 64)}
    cut = tape.cut_out(rows, 16, 4)["tokens"]
    assert cut.shape == (8, 4)
    assert cut[:, 0].tolist() == [0, 16, 32, 48, 64, 80, 96, 112]


def fabricated(scores: list[list[float]], exact: list[list[float]], domain: list[int]) -> list[Moment]:
    rows = np.full((len(domain), 1), -1)
    return [
        Moment(np.asarray(domain), rows, {EXACT: np.asarray(truth), Scorer(4): np.asarray(cheap)})
        for cheap, truth in zip(scores, exact, strict=True)
    ]


def test_what_is_used_is_what_is_counted(start: Any) -> None:
    up, down = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]
    of_run = fabricated([up, up, down, up], [up, down, down, up], [0, 0, 1, 1])
    assert mean_agreement(Setting(Scorer(4)), of_run, start, 2) == pytest.approx((1 - 1 + 1 + 1) / 4)
    assert mean_agreement(Setting(Scorer(4), 2), of_run, start, 2) == pytest.approx((1 + 1) / 4), "nothing counts as 0"


@pytest.mark.slow
def test_plans_lag_and_priors_do_not(moments: list[Moment], start: Any) -> None:
    """Windows of 2 steps: what is scored at step 0 is in the plan of step 4, and in a prior at step 1."""
    plans, prior = Plans(start, 2), Prior(start, 0.5)
    first = moments[0].scores[EXACT]
    of_plans = [plans.used(i, moment, first if i == 0 else None) for i, moment in enumerate(moments)]
    of_prior = [prior.used(i, moment, first if i == 0 else None) for i, moment in enumerate(moments)]
    assert (of_plans[0] == first).all()
    assert [np.ptp(used) > 0 for used in of_plans[1:]] == [False, False, False, True, True]
    known = start.observe(first, moments[0].domains, moments[0].documents).close()
    assert np.allclose(of_plans[4], estimates(known, known.worths(), moments[4]))
    assert all(np.ptp(used) > 0 for used in of_prior)
    assert not np.allclose(of_prior[2], of_plans[2])


def test_overheads_are_those_of_training() -> None:
    config = counted(overhead_frontier.config_of(2048, overhead_frontier.SCALES[2048]), 2048)
    spec = PRESETS["llama2-1b"]
    assert overhead(spec, config, EXACT, 1) == pytest.approx(2 + 0.25)
    assert overhead(spec, config, EXACT, 5) == pytest.approx(2.25 / 5)
    assert overhead(spec, config, replace(EXACT, derivative="difference"), 1) == pytest.approx(4 / 3 + 0.25)
    kept = replace(EXACT, proxy=Proxy(20))
    assert overhead(spec, config, kept, 1) == pytest.approx(2 + 0.25 / 20)
    assert overhead(spec, config, kept, 5) == pytest.approx((2 + 0.25 / 4) / 5)
    pieces = overhead(spec, config, Scorer(16, 4), 1) - 0.25
    assert pieces == pytest.approx(4 * (overhead(spec, config, Scorer(16), 1) - 0.25))
    with pytest.raises(ValueError, match="every 2"):
        overhead(spec, config, replace(EXACT, proxy=Proxy(5)), 2)


def test_every_setting_can_be_had() -> None:
    config = counted(overhead_frontier.config_of(2048, overhead_frontier.SCALES[2048]), 2048)
    found = frontier.every_setting(overhead_frontier.SCALES[2048].length.factors)
    assert len({setting.name for setting in found}) == len(found)
    assert all(overhead(PRESETS["tiny"], config, setting.scorer, setting.every) > 0 for setting in found)
    assert {1, 2, 4, 5, 10, 20} == {setting.every for setting in found}


def figure(name: int, cost: float, agreement: float, **changes: Any) -> Figure:
    return Figure(Setting(Scorer(name), **changes), cost, 2 * cost, (agreement,))


def test_the_frontier_and_the_best_within_a_budget() -> None:
    found = [figure(1, 1.0, 1.0), figure(2, 0.2, 0.7), figure(4, 0.2, 0.8), figure(8, 0.3, 0.6),
             figure(4, 0.09, 0.5, every=5), figure(8, 0.04, 0.4, every=5), figure(2, 0.05, 0.9, prior=0.5)]  # fmt: skip
    assert [x.mean for x in frontier.non_dominated(x for x in found if x.setting.prior is None)] == [0.4, 0.5, 0.8, 1]
    named = overhead_frontier.picked("row2048", 0.1, found)
    assert {name: x.mean for name, x in named.items()} == {
        "row2048": 0.5, "row2048_every_step": 0.8, "row2048_gpt2_xl": 0.4, "row2048_pieces": 0.5,
        "row2048_prior": 0.9, "row2048_prior_every_step": 0.9, "row2048_prior_gpt2_xl": 0.9,
    }  # fmt: skip
    assert overhead_frontier.figures_of(named)["overhead_gpt2_xl.row2048"] == [0.18]


def test_the_table_holds_what_is_worth_picking(tmp_path: Any) -> None:
    found = [figure(1, 2.0, 1.0), figure(4, 0.5, 0.8), figure(8, 0.6, 0.7), figure(4, 0.1, 0.16, every=5),
             figure(4, 0.1, 0.4, every=5, groups=True), figure(2, 0.3, 0.9, prior=0.5)]  # fmt: skip
    file = tmp_path / "points.py"
    file.write_text(points.FILE.read_text())
    points.write_table(found, file)
    known: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), known)
    assert [(p.part, p.select_every, p.refresh, p.alone, p.with_feedback) for p in known["POINTS"]] == [
        (4, 5, 1, 0.16, 0.4), (4, 1, 1, 0.8, 0.8), (1, 1, 1, 1.0, 1.0),
    ]  # fmt: skip
