"""Whole small runs: what they leave behind, and that being killed changes nothing."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from small_runs import lines, mapping, small_config, write_text

from opus_jax.config import Config, from_mapping
from opus_jax.errors import NonFiniteLossError, UserError
from opus_jax.training import loop
from opus_jax.training.loop import train

DIGESTS = ("loss_digest", "batch_digest", "update_tokens", "seen_tokens", "flops", "bits_per_byte", "selected_share")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, Any]:
    """The summary of the run that all others are compared with."""
    return train(small_config(root, run="undisturbed"), progress=False)


def copy_of(root: Path, name: str) -> Path:
    """Another run's folder with the undisturbed run's content; its configuration does not name the folder it is in."""
    return Path(shutil.copytree(root / "undisturbed", root / name))


def without_last_save(run: Path) -> None:
    """As it was after step 8 of 12, but for the logs, which are ahead of it."""
    shutil.rmtree(run / "checkpoints" / "12")
    (run / "checkpoints" / "integrity" / "12.json").unlink()
    (run / "summary.json").unlink()


def selection_rows(run: Path) -> Any:
    return pq.read_table(run / "selection").sort_by([("step", "ascending"), ("position", "ascending")])


def test_what_a_run_leaves_behind(root: Path, undisturbed: dict[str, Any]) -> None:
    run = root / "undisturbed"
    logged = lines(run)
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in logged if "bits_per_byte" in line] == [6, 12]
    assert undisturbed["target_bits_per_byte"] == undisturbed["bits_per_byte"]["prose"]
    assert undisturbed["steps"] == 12
    assert sum(undisturbed["selected_share"].values()) == pytest.approx(1)
    assert 0 < undisturbed["update_tokens"] < undisturbed["seen_tokens"]
    rows = selection_rows(run)
    assert rows.num_rows == 3 * 8 + 9 * 16, "a warm start reads only what it trains on"
    chosen = np.array(rows["selected"])
    assert chosen.sum() == 12 * 8
    scored = np.array(rows["step"]) > 3
    assert rows.filter(~scored)["utility"].null_count == 3 * 8
    assert rows.filter(scored)["utility"].null_count == 0
    audits = [line["audit_rank_agreement"] for line in logged if "audit_rank_agreement" in line]
    assert len(audits) == 3
    assert min(audits) > 0.99, "the exact engine agrees with the oracle"
    assert (run / "config.yaml").is_file()
    assert (run / "environment.json").is_file()


def test_a_finished_run_is_not_trained_again(root: Path, undisturbed: dict[str, Any]) -> None:
    before = (root / "undisturbed" / "metrics.jsonl").read_text()
    assert train(small_config(root, run="undisturbed"), progress=False) == undisturbed
    assert (root / "undisturbed" / "metrics.jsonl").read_text() == before


def test_a_changed_config_is_refused_with_the_changed_keys(root: Path, undisturbed: dict[str, Any]) -> None:
    changed = small_config(root, "selection.temperature=0.25", "run.seed=7", run="undisturbed")
    with pytest.raises(UserError, match=r"run.seed: 0 -> 7.*selection.temperature: 0.5 -> 0.25"):
        train(changed, progress=False)


def test_resume_removes_what_the_logs_had_beyond_the_checkpoint(root: Path, undisturbed: dict[str, Any]) -> None:
    run = copy_of(root, "resumed")
    without_last_save(run)
    resumed = train(small_config(root, run="resumed"), progress=False)
    assert {key: resumed[key] for key in DIGESTS} == {key: undisturbed[key] for key in DIGESTS}
    logged = [(line["step"], "loss" in line) for line in lines(run)]
    assert len(logged) == len(set(logged)) == 14
    assert selection_rows(run).equals(selection_rows(root / "undisturbed"))


@pytest.mark.parametrize("damage", ["flip", pytest.param("empty", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_passed_over(
    root: Path, undisturbed: dict[str, Any], damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(root, damage)
    (run / "summary.json").unlink()
    _damage(run / "checkpoints" / "12", damage)
    resumed = train(small_config(root, run=damage), progress=False)
    assert {key: resumed[key] for key in DIGESTS} == {key: undisturbed[key] for key in DIGESTS}
    assert "12" in capfd.readouterr().err, "it says which checkpoint it passed over"


def test_no_readable_checkpoint_is_an_error_and_not_a_fresh_start(root: Path, undisturbed: dict[str, Any]) -> None:
    run = copy_of(root, "ruined")
    (run / "summary.json").unlink()
    for step in ("8", "12"):
        _damage(run / "checkpoints" / step, "flip")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="ruined"):
        train(small_config(root, run="ruined"), progress=False)
    assert (run / "metrics.jsonl").read_text() == before


def _damage(step: Path, damage: str) -> None:
    largest = max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "truncate":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "delete":
        largest.unlink()
    else:
        shutil.rmtree(step)
        step.mkdir()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(root: Path) -> None:
    config = small_config(root, "optimizer.learning_rate=1e38", "optimizer.clip=null", run="diverged")
    with pytest.raises(NonFiniteLossError, match=r"at step \d+, on rows \["):
        train(config, progress=False)


FEEDBACK = (
    "feedback.enabled=true", "feedback.window_steps=3", "feedback.clusters=4", "feedback.temperature=0.05",
    "selection.select_every=2", "run.steps=16", "run.save_every=4", "checkpoint.keep=3",
)  # fmt: skip


def decisions(run: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (run / "decisions").iterdir()}


@pytest.fixture(scope="module")
def steered(root: Path) -> dict[str, Any]:
    """A run with feedback: warm until step 3, then every other step scores."""
    return train(small_config(root, *FEEDBACK, run="steered"), progress=False)


def test_feedback_decides_what_is_offered(root: Path, steered: dict[str, Any]) -> None:
    """Plans begin at the window boundary after the next, once something was scored; rows come by the plan in force."""
    run = root / "steered"
    assert sorted(decisions(run)) == [f"feedback-{step:09d}.json" for step in (9, 12, 15)]
    facts = json.loads(decisions(run)["feedback-000000012.json"])
    assert facts["utilities_until"] == 9
    weights = {name: domain["weight"] for name, domain in facts["domains"].items()}
    assert max(weights.values()) > 1.2 * min(weights.values())
    rows = selection_rows(run)
    assert [rows.filter(pc.equal(rows["step"], step)).num_rows for step in (3, 4, 5, 6)] == [8, 16, 8, 16]
    assert steered["scoring_overhead"] == pytest.approx(7 / 16 * (16 + 8) / 8)
    assert steered["seen_tokens"] > steered["update_tokens"]


def test_a_run_resumed_in_the_middle_of_a_window_offers_the_same(root: Path, steered: dict[str, Any]) -> None:
    run = Path(shutil.copytree(root / "steered", root / "steered-again"))
    shutil.rmtree(run / "checkpoints" / "16")
    (run / "checkpoints" / "integrity" / "16.json").unlink()
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "12")
    (run / "checkpoints" / "integrity" / "12.json").unlink()
    assert (run / "checkpoints" / "8").is_dir(), "from there on it resumes: in the middle of the window of steps 7 to 9"
    resumed = train(small_config(root, *FEEDBACK, run="steered-again"), progress=False)
    assert {key: resumed[key] for key in DIGESTS} == {key: steered[key] for key in DIGESTS}
    assert decisions(run) == decisions(root / "steered")
    assert selection_rows(run).equals(selection_rows(root / "steered"))


def test_reading_ahead_changes_nothing_under_feedback(root: Path, steered: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(loop, "CandidateStream", functools.partial(loop.CandidateStream, threads=0))
    slow = train(small_config(root, *FEEDBACK, run="steered-slowly"), progress=False)
    assert {key: slow[key] for key in DIGESTS} == {key: steered[key] for key in DIGESTS}


@pytest.mark.parametrize("method", ["none", "random", "high_loss"])
def test_other_methods_train(root: Path, undisturbed: dict[str, Any], method: str) -> None:
    summary = train(small_config(root, f"selection.method={method}", run=method), progress=False)
    assert summary["scoring_overhead"] == {"none": 0, "random": 0, "high_loss": 0.75 * 16 / 8 / 3}[method]
    assert summary["batch_digest"] != undisturbed["batch_digest"]
    assert (root / method / "selection").exists() == (method != "none")
    if method == "none":
        assert summary["seen_tokens"] == summary["update_tokens"]


# -------------------------------------------------------------------------------------------- real processes


def start(config: Config, root: Path) -> subprocess.Popen[str]:
    """`opus-jax train` on one device; what it compiles is kept for the next start."""
    file = root / f"{Path(config.run.dir or '').name}.yaml"
    config.save(file)
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-m", "opus_jax", "train", str(file)]
    return subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def finish(config: Config, root: Path) -> dict[str, Any]:
    process = start(config, root)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return json.loads((Path(config.run.dir or "") / "summary.json").read_text())


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


def long_config(root: Path, run: str) -> Config:
    """Enough steps that a signal arrives in the middle."""
    settings = mapping(root, run)
    settings["run"] |= {"steps": 160, "save_every": 20, "eval_every": 80}
    settings["selection"] |= {"select_every": 2}
    settings["feedback"] = {"enabled": True, "window_steps": 7, "clusters": 4}
    return from_mapping(settings)


@pytest.mark.slow
def test_killed_at_any_moment_and_interrupted_the_run_ends_as_if_nothing_had_happened(root: Path) -> None:
    whole = finish(long_config(root, "whole"), root)
    config, run = long_config(root, "killed"), root / "killed"
    for step in (3, 45):  # before the first checkpoint, and between two
        process = start(config, root)
        wait_for_step(run, step, process)
        process.kill()
        process.communicate()
    for step, stop, code in ((70, signal.SIGTERM, 0), (95, signal.SIGINT, 130)):
        process = start(config, root)
        wait_for_step(run, step, process)
        process.send_signal(stop)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == code, errors
        assert "the same command goes on" in errors
    resumed = finish(config, root)
    assert {key: resumed[key] for key in DIGESTS} == {key: whole[key] for key in DIGESTS}
    assert [line["loss"] for line in lines(run) if "loss" in line] == [
        line["loss"] for line in lines(root / "whole") if "loss" in line
    ]
    assert selection_rows(run).equals(selection_rows(root / "whole"))
    assert decisions(run) == decisions(root / "whole")
