from pathlib import Path

import numpy as np
import pytest
from fabricate import HOSTILE, small_config, target_curve, write_run

from opus_jax.errors import UserError
from opus_jax.reports.run import load_run, sibling


def test_finished_run(trained: Path) -> None:
    run = load_run(trained)
    assert (run.name, run.method, run.steps) == ("run", "opus", 80)
    assert sorted(run.domains) == sorted(HOSTILE)
    assert run["update_tokens"].values[:3].tolist() == [1000, 2000, 3000]
    assert run["target_bits_per_byte"].steps.tolist() == list(range(10, 81, 10))
    assert run.by_domain["bits_per_byte"]["prose"].values[-1] == pytest.approx(target_curve(80, 0.1))
    assert run.at("flops", np.array([10, 11])).tolist() == [20e9, 22e9]
    assert run.total("parameters") == 690_000
    assert not len(run["never logged"].steps)
    assert np.isnan(run.at("never logged", np.array([1]))).all()


def test_a_number_that_was_not_finite_is_nan(trained: Path) -> None:
    loss = load_run(trained)["loss"]
    assert loss.steps[np.isnan(loss.values)].tolist() == [7]


def test_unfinished_run_with_a_torn_line(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", small_config(tmp_path), ["prose", "code"], finished=False))
    assert run.summary is None
    assert run.steps == 40
    assert run.total("update_tokens") == 40_000
    assert run.total("wall_seconds") is None


def test_run_before_its_first_step(tmp_path: Path) -> None:
    small_config(tmp_path).save(tmp_path / "config.yaml")
    run = load_run(tmp_path)
    assert (run.steps, run.domains, run.total("flops")) == (0, [], None)
    assert not run.selection.exists


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        load_run(tmp_path)


@pytest.mark.parametrize("line", ['{"step": 1, "loss"\n', "[1]\n"])
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    small_config(tmp_path).save(tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + line)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is damaged"):
        load_run(tmp_path)


def test_damaged_summary_is_named(tmp_path: Path) -> None:
    small_config(tmp_path).save(tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        load_run(tmp_path)


def test_sibling(trained: Path) -> None:
    assert sibling(load_run(trained)) == trained.with_name("run-random")
    assert sibling(load_run(trained.with_name("run-random"))) is None
