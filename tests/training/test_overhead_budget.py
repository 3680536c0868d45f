"""selection.max_overhead: what is picked fits, is the best that fits, and is what the run then does and says."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config

from opus_jax.config import Config, from_mapping, replace
from opus_jax.errors import ConfigError, UserError
from opus_jax.models.presets import PRESETS
from opus_jax.training import loop, overhead_budget
from opus_jax.training.build import buffers_of
from opus_jax.training.costs import step_costs
from opus_jax.training.overhead_budget import LEFT_ALONE, overhead, pick, within_budget
from opus_jax.training.overhead_points import POINTS, Point

SPEC = PRESETS["gpt2-small"]


def config(budget: float | None = 0.1, *overrides: str, **selection: Any) -> Config:
    sections = {
        "run": {"steps": 1000},
        "corpus": {"row_tokens": 1024},
        "batch": {"rows": 32},
        "proxy": {"rows": 8},
        "selection": {"max_overhead": budget, **selection},
    }
    return from_mapping(sections, overrides)


def by_hand(point: Point) -> Config:
    settings = {
        "window": None if point.part == 1 else 1024 // point.part,
        "derivative": point.derivative,
        "parameters": point.parameters,
        "select_every": point.select_every,
    }
    window = "null" if point.proxy_part == 1 else 1024 // point.proxy_part
    proxy = (f"proxy.refresh={point.refresh}", f"proxy.window={window}", f"proxy.ema={point.ema}")
    return config(None, *proxy, **settings)


def decided(of: Config) -> dict[str, Any]:
    values = {"selection": of.selection, "proxy": of.proxy}
    return {key: getattr(values[key.split(".")[0]], key.split(".")[1]) for key in LEFT_ALONE}


def test_without_a_budget_nothing_changes() -> None:
    given = config(None, "selection.select_every=3")
    assert within_budget(SPEC, given) is given


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("feedback", [False, True])
def test_the_best_that_fits_is_taken(budget: float, feedback: bool) -> None:
    found = pick(SPEC, config(budget, f"feedback.enabled={feedback}"))
    assert found.overhead == overhead(SPEC, found.config) <= budget
    agreement = found.point.agreement(feedback=feedback)
    for point in POINTS:
        if point.agreement(feedback=feedback) > agreement:
            assert overhead(SPEC, by_hand(point)) > budget


def test_more_budget_never_ranks_worse() -> None:
    found = [pick(SPEC, config(budget)) for budget in (0.03, 0.1, 0.3, 1.0, 4.0)]
    agreements = [x.point.alone for x in found]
    assert agreements == sorted(agreements)
    assert agreements[-1] == max(point.alone for point in POINTS) > agreements[0]


def test_points_are_all_different_and_one_is_exact() -> None:
    settings = [(p.part, p.derivative, p.parameters, p.select_every, p.refresh, p.proxy_part, p.ema) for p in POINTS]
    assert len(set(settings)) == len(settings)
    assert max(p.alone for p in POINTS) == 1
    assert all(0 < p.alone <= p.with_feedback <= 1 for p in POINTS)


def test_with_feedback_estimates_count_where_nothing_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    often, rarely = (
        Point(16, "difference", "all", 1, 5, 1, 0.0, 0.5, 0.5),
        Point(1, "difference", "all", 20, 1, 1, 0.0, 0.05, 0.6),
    )
    monkeypatch.setattr(overhead_budget, "POINTS", (often, rarely))
    assert pick(SPEC, config(1.0)).point == often
    assert pick(SPEC, config(1.0, "feedback.enabled=true")).point == rarely


@pytest.mark.parametrize(("steps", "warm"), [(1000, 20), (57, 5), (7, 3), (4, 4), (9, 0)])
def test_overhead_is_what_the_run_will_count(steps: int, warm: int) -> None:
    """Sum over the steps after the warm start, as the run's totals take it."""
    given = config(
        None, f"run.steps={steps}", f"selection.warm_start_steps={warm}", "selection.select_every=5", "proxy.refresh=3"
    )
    costs, buffers = step_costs(SPEC, given), buffers_of(given)
    counted = sum(costs.selection(step, given, buffers) for step in range(warm, steps))
    assert overhead(SPEC, given) == pytest.approx(counted / (costs.update * max(steps - warm, 1)), rel=1e-12)


def test_what_was_picked_is_left_as_it_is() -> None:
    once = within_budget(SPEC, config())
    assert within_budget(SPEC, once) == once


@pytest.mark.parametrize(
    "override",
    [
        "selection.window=100", "selection.window_place=random", "selection.parameters=blocks",
        "selection.select_every=3", "proxy.refresh=7", "proxy.window=9", "proxy.ema=0.5",
    ],
)  # fmt: skip
def test_keys_that_the_budget_decides_are_not_set_by_hand(override: str) -> None:
    with pytest.raises(ConfigError, match=r"selection\.max_overhead decides this key") as caught:
        within_budget(SPEC, config(0.1, override))
    assert caught.value.key == override.split("=")[0]


def test_a_budget_below_everything_says_the_least() -> None:
    with pytest.raises(ConfigError, match="raise it to that") as caught:
        within_budget(SPEC, config(1e-6))
    least = float(str(caught.value).split("costs ")[1].split(" ")[0])
    assert pick(SPEC, config(least + 1e-4)).overhead <= least + 1e-4


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"max_overhead": 0.0}, "selection.max_overhead"),
        ({"method": "random"}, "selection.method"),
        ({"engine": "ghost"}, "selection.engine"),
        ({"rank": 4}, "selection.rank"),
    ],
)
def test_settings_that_leave_nothing_to_pick_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping({"selection": {"max_overhead": 0.1} | settings})
    assert caught.value.key == key


def test_a_run_does_and_says_what_was_picked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = small_config(tmp_path, "selection.max_overhead=0.5", "selection.audit_every=0", "run.save_every=12")
    summary = loop.train(given)
    saved = Config.load(tmp_path / "run")
    assert saved.selection.max_overhead == 0.5
    assert decided(saved) == {key: summary["max_overhead_picks"][key] for key in LEFT_ALONE}
    assert decided(saved) != LEFT_ALONE
    assert 0 < summary["scoring_overhead"] <= summary["max_overhead_picks"]["overhead"] <= 0.5
    assert "selection.max_overhead picks selection.window" in capsys.readouterr().err
    assert loop.train(given) == summary, "the same command finds the run finished"
    assert loop.train(replace(saved, run=given.run)) == summary, "and so does the folder's configuration"
    with pytest.raises(UserError, match=r"selection\.max_overhead: 0\.5 -> 0\.6"):
        loop.train(replace(given, selection=replace(given.selection, max_overhead=0.6)), progress=False)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
