"""Real runs, really disturbed: after each fault the same command goes on, and the run ends as if nothing had been."""

import json
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from run_processes import Processes, digests, finished, long_config, started
from small_runs import lines, small_config, write_text

from opus_jax.config import Config
from opus_jax.data.records import Manifest
from opus_jax.errors import UserError
from opus_jax.training.checkpoint import committed_steps
from opus_jax.training.loop import train
from opus_jax.training.recorder import Recorder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_text(folder / "text")
    return folder


# ------------------------------------------------------------------------------------- one process, this one

SHORT = ("selection.method=random", "run.steps=8", "run.eval_every=8", "run.save_every=4")


@pytest.fixture(scope="module")
def short(root: Path) -> dict[str, Any]:
    return train(small_config(root, *SHORT, run="short"), progress=False)


def test_a_clock_that_jumps_changes_nothing(root: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A day forward, two back, three forward, between steps and while a save is being written."""
    clock, record, ahead = time.time, Recorder.record, {1: 0, 2: 1, 3: -1, 5: 2}

    def jump(self: Recorder, done: Any) -> None:
        days = [ahead[step] for step in sorted(ahead) if step <= done.step][-1]
        monkeypatch.setattr(time, "time", lambda: clock() + 86400 * days)
        record(self, done)

    monkeypatch.setattr(Recorder, "record", jump)
    jumped = train(small_config(root, *SHORT, run="jumped"), progress=False)
    assert digests(jumped) == digests(short)
    assert 0 < jumped["wall_seconds"] < 600


def _records(run: Path) -> Path:
    return Path(json.loads((run / "records.json").read_text())["folder"])


def _with_damaged_corpus(root: Path, short_run: Path, name: str) -> Config:
    """A copy of the prepared corpus with a lost training shard, under a cache of its own."""
    records = _records(short_run)
    copy = root / name / "cache" / "records" / records.name
    shutil.copytree(records, copy)
    (copy / Manifest.load(copy).shards["train"][0]).unlink()
    return small_config(root, *SHORT, f"corpus.cache_dir={root / name / 'cache'}", run=f"{name}-run")


def test_a_missing_shard_is_named_or_counted(root: Path, short: dict[str, Any]) -> None:
    config = _with_damaged_corpus(root, root / "short", "lost")
    with pytest.raises(UserError, match=r"train-00000-of-00001.array_record is missing.*corpus.lenient=true"):
        train(config, progress=False)
    lenient = small_config(
        root, *SHORT, f"corpus.cache_dir={config.corpus.cache_dir}", "corpus.lenient=true", run="lost-run"
    )
    summary = train(lenient, progress=False)
    assert summary["unreadable_rows"] == 8 * lenient.candidates, "the corpus has one training shard"
    assert summary["batch_digest"] == short["batch_digest"], "the same rows are drawn, without their text"
    assert summary["update_tokens"] == 0
    assert [line["unreadable_rows"] for line in lines(root / "lost-run") if "loss" in line][:2] == [16, 32]


# --------------------------------------------------------------------------- one process of its own, disturbed


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, Any]:
    return finished(long_config(root, "whole", "selection.method=random"), root)


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_0(root: Path, whole: dict[str, Any]) -> None:
    config = long_config(root, "preempted", "selection.method=random", "checkpoint.temporary_every=7")
    with started(config, root) as processes:
        processes.wait_for_step(50)
        processes.all[0].send_signal(signal.SIGTERM)
        assert processes.codes(60) == [0]
        assert "the same command goes on from there" in processes.said(0)
    assert not (root / "preempted" / "summary.json").exists(), "which tells it from a run that is over"
    assert committed_steps(root / "preempted" / "checkpoints")[-1] >= 50
    assert digests(finished(config, root)) == digests(whole)
    assert committed_steps(root / "preempted" / "checkpoints")[-2:] == [140, 160], "no temporary one is left"


@pytest.mark.slow
def test_a_full_disk_ends_with_2_and_the_run_goes_on_afterwards(root: Path, whole: dict[str, Any]) -> None:
    """A limit on the size of files makes every larger write fail as a full disk does."""
    config = long_config(root, "full", "selection.method=random", "run.compilation_cache=null")
    with started(config, root) as processes:
        processes.wait_for_step(45)
        resource.prlimit(processes.all[0].pid, resource.RLIMIT_FSIZE, (2048, 2048))
        assert processes.codes(60) == [2]
    assert "File too large" in processes.said(0)
    assert "checkpoint" in processes.said(0).splitlines()[-1]
    assert digests(finished(config, root)) == digests(whole)


@pytest.mark.slow
def test_temporary_checkpoints_bound_what_a_kill_loses(root: Path, whole: dict[str, Any]) -> None:
    config = long_config(root, "temporary", "selection.method=random", "checkpoint.temporary_every=4")
    with started(config, root) as processes:
        processes.wait_for_step(58)
        processes.kill()
    logged = max(line["step"] for line in lines(root / "temporary") if "loss" in line)
    steps = committed_steps(root / "temporary" / "checkpoints")
    assert logged - steps[-1] <= 2 * 4 + 1, "at most the save that was on its way and the steps of the next"
    assert {20, 40} <= set(steps)
    assert digests(finished(config, root)) == digests(whole)


# ------------------------------------------------------------------------------------------- two processes

TWO = ("selection.method=random", "run.steps=600", "run.save_every=100", "run.eval_every=600", "mesh.data=2")


@pytest.fixture(scope="module")
def whole_of_two(root: Path) -> dict[str, Any]:
    return finished(long_config(root, "whole-of-two", *TWO), root, 2)


def _stopped_after(processes: Processes) -> list[str]:
    said = [processes.said(i) for i in range(2)]
    return [text.split("stopped after step ")[1].split(",")[0] for text in said]


@pytest.mark.slow
@pytest.mark.parametrize(("service", "asked"), [("true", 1), ("false", 0)])
def test_sigterm_to_one_of_two_saves_the_same_step(
    root: Path, whole_of_two: dict[str, Any], service: str, asked: int
) -> None:
    config = long_config(root, f"noticed-{service}", *TWO)
    with started(config, root, 2, JAX_ENABLE_PREEMPTION_SERVICE=service) as processes:
        processes.wait_for_step(30)
        processes.all[asked].send_signal(signal.SIGTERM)
        assert processes.codes(100) == [0, 0], [processes.said(i) for i in range(2)]
        first, second = _stopped_after(processes)
    assert first == second
    assert committed_steps(processes.run / "checkpoints")[-1] == int(first)
    assert digests(finished(config, root, 2)) == digests(whole_of_two)


@pytest.mark.slow
def test_one_of_two_is_killed_or_hangs_and_the_other_ends_at_once(root: Path, whole_of_two: dict[str, Any]) -> None:
    """Killed in a step, killed in a save, and stopped: each time the other says so and ends within seconds."""
    config = long_config(root, "disturbed", *TWO, "run.watchdog_seconds=15")
    for victim, step in ((1, 30), (0, 100)):  # a save begins after step 100
        with started(config, root, 2) as processes:
            processes.wait_for_step(step)
            processes.all[victim].kill()
            begun = time.monotonic()
            code = processes.all[1 - victim].wait(60)
            assert time.monotonic() - begun < 30
            # JAX's own check may be the first to notice, and aborts
            noticed = {1: "another process has probably ended", -signal.SIGABRT: "JAX distributed service detected"}
            assert noticed[code] in processes.said(1 - victim)
    with started(config, root, 2) as processes:
        processes.wait_for_step(max(committed_steps(processes.run / "checkpoints"), default=0) + 130)
        processes.all[1].send_signal(signal.SIGSTOP)
        assert processes.all[0].wait(60) == 1, processes.said(0)
        assert "has taken more than 15 seconds" in processes.said(0)
        assert "most recent call first" in processes.said(0), "the stacks"
    assert digests(finished(config, root, 2)) == digests(whole_of_two)
