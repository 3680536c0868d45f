"""scoring_cost: whole-row scores are the measure, absent scores count as 0, and costs are those of training."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from small_runs import small_config

from benchmarks import scoring_cost
from benchmarks.scoring_cost import MODES, SCORINGS, GroupEstimates, Mode, Scorer
from opus_jax.training.build import Parts, build

STEPS = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory: Any) -> Parts:
    overrides = [
        "selection.temperature=.inf", "selection.audit_every=0", "selection.warm_start_steps=0", "model.layers=2",
        "feedback.enabled=true", "feedback.window_steps=2", "feedback.clusters=2", "corpus.row_tokens=64",
    ]  # fmt: skip
    return build(small_config(tmp_path_factory.mktemp("scoring"), *overrides), progress=False)


@pytest.fixture(scope="module", autouse=True)
def _fewer_scorings() -> Iterator[None]:
    """Each compiles for itself."""
    kept = {name: SCORINGS[name] for name in ("row", "half", "eighth", "difference", "top_half")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_cost, "SCORINGS", kept)
        patch.setattr(scoring_cost, "MODES", {name: mode for name, mode in MODES.items() if mode.scoring in kept})
        yield


@pytest.fixture(scope="module")
def scorer(parts: Parts) -> Scorer:
    return Scorer(parts)


@pytest.fixture(scope="module")
def scores(parts: Parts, scorer: Scorer) -> list[tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    return list(scoring_cost.scored_steps(parts, scorer, STEPS))


@pytest.fixture
def found(parts: Parts, scorer: Scorer, scores: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(scoring_cost, "scored_steps", lambda *_: iter(scores))
    return scoring_cost.agreements(parts, scorer, STEPS)


@pytest.mark.slow
def test_every_step_is_scored_and_the_model_moves(scores: Any) -> None:
    assert [step for step, _, _ in scores] == list(range(STEPS))
    assert all(set(found) == set(scoring_cost.SCORINGS) for _, _, found in scores)
    assert not np.allclose(scores[0][2]["row"], scores[-1][2]["row"])


def test_agreement_falls_with_what_is_left_out(found: dict[str, float]) -> None:
    assert found["row"] == pytest.approx(1)
    assert found["difference"] > 0.95
    assert 1 > found["half"] > found["eighth"]
    assert 1 > found["top_half"] > 0
    assert set(found) == set(scoring_cost.MODES)


def test_steps_without_scores_count_as_no_agreement(found: dict[str, float]) -> None:
    assert found["select_every_5"] == pytest.approx(2 / STEPS)  # steps 0 and 5
    assert found["select_every_20"] == pytest.approx(1 / STEPS)
    assert found["half_select_every_5"] < found["half"]
    assert found["feedback_groups_5"] != found["select_every_5"], "estimates of groups stand in"


def test_group_estimates_keep_the_lag_of_plans(parts: Parts, scores: Any) -> None:
    """Windows of 2 steps: scores of steps 0 and 1 are in use from step 4 on."""
    groups, used = GroupEstimates(parts), {}
    for step, host, found in scores:
        used[step] = groups.used(step, host, found["row"] if step == 0 else None)
    assert (used[0] == scores[0][2]["row"]).all()
    for step in (1, 2, 3):
        assert not used[step].any(), "nothing is known yet"
    controller = parts.steering().controller
    assert controller is not None
    first = scores[0]
    known = controller.observe(first[2]["row"], first[1]["domain_id"], first[1]["document_ids"]).close()
    documents = scores[4][1]["document_ids"]
    alone = (documents >= 0).sum(1) == 1
    assert alone.any()
    assert np.allclose(used[4][alone], known.worths()[-1][documents[alone].max(1)])
    assert np.ptp(used[4]) > 0


def test_constant_scores_agree_with_nothing() -> None:
    assert scoring_cost.spearman(np.zeros(4), np.arange(4.0)) == 0
    assert scoring_cost.spearman(np.arange(4.0), np.arange(4.0)) == pytest.approx(1)


def test_overheads_are_those_of_training(parts: Parts) -> None:
    found = scoring_cost.overheads(parts)
    # N / K = 2 rows of scoring and 1 of proxy for every row of training, each 3F
    assert found["row"] == pytest.approx(3)
    assert found["select_every_5"] == pytest.approx(3 / 5)
    assert found["feedback_groups_20"] == found["select_every_20"] == pytest.approx(3 / 20)
    assert found["difference"] == pytest.approx(1 + 2 * 2 / 3)
    assert found["row"] > found["half"] > found["eighth"] > 1
    assert found["row"] > found["top_half"]


def test_times_are_measured_for_every_scoring(parts: Parts, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_cost, "SCORINGS", {"row": {}})
    monkeypatch.setattr(scoring_cost, "MODES", {"row": Mode(), "select_every_5": Mode(every=5)})
    found = scoring_cost.time_overheads(parts, scorer, pairs=2)
    assert min(found["row"]) > 0
    assert found["select_every_5"] == [x / 5 for x in found["row"]]


def test_the_modes_make_the_curve_that_is_asked_for() -> None:
    assert {scoring_cost.WINDOWS[name] / scoring_cost.ROW_TOKENS for name in ("half", "quarter", "eighth")} == {
        1 / 2, 1 / 4, 1 / 8,
    }  # fmt: skip
    assert {mode.every for mode in MODES.values()} == {1, 5, 20}
    assert {mode.scoring for mode in MODES.values()} == set(SCORINGS)
    assert -(-scoring_cost.LAYERS // 4) < -(-scoring_cost.LAYERS // 2) < scoring_cost.LAYERS
