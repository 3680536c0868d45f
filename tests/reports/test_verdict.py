from pathlib import Path

import numpy as np
import pytest
from fabricate import small_config, target_curve, write_run

from opus_jax.config import Config
from opus_jax.errors import UserError
from opus_jax.reports.run import Run, load_run
from opus_jax.reports.series import Series
from opus_jax.reports.verdict import flop_ratio, token_ratio, verdict


def made(folder: Path, name: str, gain: float, method: str = "opus", **sections: dict) -> Run:
    config: Config = small_config(folder, **({"selection": {"method": method, "warm_start_steps": 0}} | sections))
    return load_run(write_run(folder / name, config, ["prose"], gain=gain))


def test_a_gain(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", 0.1), made(tmp_path, "r-random", 0.0, "random")
    first, second, third = verdict(run)
    assert first.startswith("Trained a model of 690k parameters on 80.0k tokens chosen by opus, 80 steps; report: ")
    assert first.endswith("r/report.html")
    assert "(prose): 2.9916 against 3.0916 of r-random at the same update tokens: 3.2 % better" in second
    # The curve crosses 3 + 5 exp(-80 / 20) between the evaluations at 60 and 70.
    at = np.interp(-target_curve(80, 0), [-target_curve(60, 0.1), -target_curve(70, 0.1)], [60, 70])
    assert token_ratio(run, random) == pytest.approx(80 / at)
    # A step of `run` costs twice the FLOPs of one of `random`.
    assert flop_ratio(run, random) == pytest.approx(40 / at)
    assert f"(token ratio {80 / at:.2f}, FLOPs ratio {40 / at:.2f})" in second
    assert third == "Cost: 2.00x the FLOPs and 2.50x the wall time of r-random; choosing cost 100 % of training"


def test_a_loss_is_said(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", -0.1), made(tmp_path, "other", 0.0, "random")
    second = verdict(run, random)[1]
    assert "3.2 % worse; the final value of other was not reached" in second
    assert token_ratio(run, random) is None
    assert flop_ratio(run, random) is None


def test_the_first_crossing_counts(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", 0.0), made(tmp_path, "b", 0.0, "random")
    bits = np.array([4.0, 3.0, 5.0, 2.0])
    run.scalars["target_bits_per_byte"] = Series(np.array([10, 20, 30, 80]), bits)
    random.scalars["target_bits_per_byte"] = Series(np.array([10, 40]), np.array([4.0, 3.5]))
    # Random's goal is what it had at step 40, although it went on to 80 without evaluating.
    assert token_ratio(run, random) == pytest.approx(40 / 15)


def test_totals_that_were_not_logged_give_no_ratio(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", 0.1), made(tmp_path, "b", 0.0, "random")
    del random.scalars["flops"]
    assert flop_ratio(run, random) is None
    assert verdict(run, random)[1].endswith(f"(token ratio {token_ratio(run, random):.2f})")


def test_equal_runs(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", 0.0), made(tmp_path, "r-random", 0.0, "random")
    assert token_ratio(run, random) == 1.0
    assert ": equal; " in verdict(run)[1]


def test_below_at_the_first_evaluation_is_a_bound(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", 9.0), made(tmp_path, "r-random", 0.0, "random")
    assert token_ratio(run, random) == 8.0
    assert "after at most 12 % of its update tokens" in verdict(run)[1]


def test_a_decaying_rate_is_a_bound(tmp_path: Path) -> None:
    decay = {"optimizer": {"schedule": "cosine"}}
    run = made(tmp_path, "r", 0.1, **decay)
    made(tmp_path, "r-random", 0.0, "random", **decay)
    assert "after at most 8" in verdict(run)[1]


def test_other_budgets_are_said(tmp_path: Path) -> None:
    run, random = made(tmp_path, "r", 0.1), made(tmp_path, "b", 0.0, "random", run={"steps": 160})
    assert "(NOT the same update tokens: 80.0k against 160k)" in verdict(run, random)[1]


def test_other_text_is_not_compared(tmp_path: Path) -> None:
    run = made(tmp_path, "r", 0.1)
    noisy = made(tmp_path, "b", 0.0, "random", corpus={"noise": {"prose": "shuffle:0.5"}})
    assert verdict(run, noisy)[1].endswith("2.9916; b has 3.0916 on other text (corpus.noise), not comparable")


def test_without_a_run_to_compare_with(tmp_path: Path) -> None:
    _, second, third = verdict(made(tmp_path, "r", 0.1))
    assert second == "Target bits per byte (prose): 2.9916; no run to compare with (opus-jax report r --compare RUN)"
    assert third == "Cost: 160G FLOPs, 30 s, choosing cost 100 % of training"


def test_unfinished_and_unstarted_runs(tmp_path: Path) -> None:
    half = load_run(write_run(tmp_path / "half", small_config(tmp_path), ["prose"], finished=False))
    assert verdict(half)[0].startswith("Unfinished, 40 of 80 steps: trained a model on 40.0k tokens chosen by opus")
    (tmp_path / "new").mkdir()
    small_config(tmp_path).save(tmp_path / "new" / "config.yaml")
    new = load_run(tmp_path / "new")
    assert verdict(new)[1:] == ["Target bits per byte (prose): not evaluated yet", "Cost: cost of choosing unknown"]
    assert "new has not been evaluated yet" in verdict(half, new)[1]


def test_baseline_may_be_a_folder(tmp_path: Path) -> None:
    run = made(tmp_path, "r", 0.1)
    made(tmp_path, "b", 0.0, "random")
    assert "of b at the same" in verdict(run, str(tmp_path / "b"))[1]
    with pytest.raises(UserError, match="is not a run folder"):
        verdict(run, tmp_path / "absent")
