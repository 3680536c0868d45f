"""A run in processes of its own, ended at random moments and started again until it is done."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from opus_jax.config import Config
from opus_jax.training.checkpoint import committed_steps
from opus_jax.training.checkpoint_format import TEMPORARY

PATIENCE_SECONDS = 300.0
MOMENTS = ("step", "saving", "starting")
STARTING_SECONDS = 8.0  # a start takes about so long
Batches = dict[int, list[int]]  # step -> example ids of its update rows, in order


@dataclass(frozen=True)
class End:
    """One disturbance.

    Attributes:
      kind: the signal, and 'saving' where it came while a checkpoint was being written.
      repeated: steps that had been logged and are trained again after it.
      behind: steps from the checkpoint that the run goes on from to the newest that was whole when the signal came;
        0 = nothing is lost beyond the last save.
    """

    kind: str
    repeated: int
    behind: int


@dataclass(frozen=True)
class Compared:
    """A finished run beside the undisturbed one: steps that lack or have other rows, steps that were trained twice."""

    lost: int
    doubled: int
    exact: bool


class Run:
    """The processes and the folder of one run."""

    def __init__(self, config: Config, root: Path, processes: int):
        self.folder, self.kills = Path(config.run.dir or ""), 0
        self._file, self._count = root / f"{self.folder.name}.yaml", processes
        config.save(self._file)

    def start(self) -> list[subprocess.Popen[bytes]]:
        shared, log = dict(os.environ), self._file.with_suffix(".log").open("ab")
        if self._count > 1:
            shared |= {"OPUS_JAX_COORDINATOR": f"localhost:{_free_port()}", "OPUS_JAX_PROCESSES": str(self._count)}
            shared["OPUS_JAX_JOIN_SECONDS"] = "30"  # for one that is ended before the others have seen it
        command = [sys.executable, "-m", "opus_jax", "train", str(self._file)]
        with log:
            return [
                subprocess.Popen(command, env=shared | {"OPUS_JAX_PROCESS": str(i)} if self._count > 1 else shared,
                                 stdout=log, stderr=log)
                for i in range(self._count)
            ]  # fmt: skip

    def finish(self) -> None:
        """Train to the end without a disturbance."""
        processes = self.start()
        try:
            _require_done(self, [process.wait(PATIENCE_SECONDS) for process in processes])
        finally:
            _kill(processes)

    def is_done(self) -> bool:
        return (self.folder / "summary.json").exists()

    def said(self) -> str:
        return self._file.with_suffix(".log").read_text(errors="replace")[-3000:]

    def logged_step(self) -> int:
        """The last whole line of metrics.jsonl that is of a step."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return 0
        whole = [
            line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n") and '"loss"' in line
        ]
        return json.loads(whole[-1])["step"] if whole else 0

    def saved_step(self) -> int:
        return max(committed_steps(self.folder / "checkpoints"), default=0)

    def is_saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(f"*{TEMPORARY}*"))

    def has_come(self, moment: str, step: int, paused: bool) -> bool:
        if moment == "starting":
            return paused
        return self.logged_step() >= step and (moment == "step" or self.is_saving())

    def compare(self, whole: "Run") -> Compared:
        ours, theirs = self._batches(), whole._batches()
        lost = sum(ours.get(step, [])[: len(rows)] != rows for step, rows in theirs.items())
        doubled = sum(len(rows) > len(theirs.get(step, [])) for step, rows in ours.items())
        digests = [
            [json.loads((run.folder / "summary.json").read_text())[key] for key in ("loss_digest", "batch_digest")]
            for run in (self, whole)
        ]
        return Compared(lost, doubled, digests[0] == digests[1])

    def _batches(self) -> Batches:
        table = pq.read_table(self.folder / "selection", columns=["step", "position", "example_id", "selected"])
        table = table.filter(pc.field("selected")).sort_by([("step", "ascending"), ("position", "ascending")])
        found: Batches = {}
        for step, example in zip(table["step"].to_pylist(), table["example_id"].to_pylist(), strict=True):
            found.setdefault(step, []).append(example)
        return found


def disturbed_until_done(run: Run, dice: random.Random, deadline: float) -> list[End]:
    """End the run at random moments until it is done; after the deadline let it train on in peace."""
    ends: list[End] = []
    while not run.is_done():
        if time.monotonic() > deadline and ends:
            run.finish()
            break
        end = _disturb(run, dice)
        ends += [end] if end else []
    return ends


def _disturb(run: Run, dice: random.Random) -> End | None:
    """One start and one end; None where the run was done before the moment came."""
    wanted, number = dice.choice(MOMENTS), dice.choice((signal.SIGKILL, signal.SIGTERM))
    step, pause = run.logged_step() + dice.randint(1, 120), dice.uniform(0, STARTING_SECONDS)
    begun, processes = time.monotonic(), run.start()
    try:
        while not run.has_come(wanted, step, time.monotonic() - begun > pause):
            time.sleep(0.002)
            if any(process.poll() is not None for process in processes):
                _require_done(run, [process.wait(PATIENCE_SECONDS) for process in processes])
                return None
        saving, saved = run.is_saving(), run.saved_step()
        dice.choice(processes).send_signal(signal.SIGKILL if wanted == "starting" else number)
        for process in processes:
            process.wait(PATIENCE_SECONDS)
    finally:
        _kill(processes)
    if run.is_done():
        return None
    run.kills += 1
    kind = "SIGKILL while starting" if wanted == "starting" else number.name + " while saving" * saving
    kept = run.saved_step()
    return End(kind, repeated=max(run.logged_step() - kept, 0), behind=max(saved - kept, 0))


def _require_done(run: Run, codes: list[int]) -> None:
    if any(codes) or not run.is_done():
        raise RuntimeError(f"{run.folder.name} ended by itself with {codes}: {run.said()}")


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
