"""Real runs in processes of their own, to be disturbed: started, watched by their log, waited for, and never left."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from small_runs import mapping, write_text

from opus_jax.config import Config, from_mapping

DIGESTS = ("loss_digest", "batch_digest", "update_tokens", "seen_tokens", "flops", "bits_per_byte", "selected_share")


def long_config(root: Path, run: str, *overrides: str) -> Config:
    """Enough steps that a signal arrives in the middle of them."""
    if not (root / "text").exists():
        write_text(root / "text")
    settings = mapping(root, run)
    settings["run"] |= {"steps": 160, "save_every": 20, "eval_every": 80}
    settings["selection"] |= {"select_every": 2, "audit_every": 0}
    return from_mapping(settings, overrides)


class Processes:
    """The processes of one run. Output goes to files, so that none waits for a reader."""

    def __init__(self, config: Config, root: Path, count: int, **variables: str):
        self.run = Path(config.run.dir or "")
        file = root / f"{self.run.name}.yaml"
        config.save(file)
        shared = _environment(root) | variables
        if count > 1:
            shared |= {"OPUS_JAX_COORDINATOR": f"localhost:{_free_port()}", "OPUS_JAX_PROCESSES": str(count)}
        self.errors = [root / f"{self.run.name}-{time.monotonic_ns()}-{i}.err" for i in range(count)]
        self.all = [
            subprocess.Popen(
                [sys.executable, "-m", "opus_jax", "train", str(file)],
                env=shared | ({"OPUS_JAX_PROCESS": str(i)} if count > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=self.errors[i].open("w"),
            )
            for i in range(count)
        ]

    def said(self, process: int) -> str:
        return self.errors[process].read_text()

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        """Until the step is in metrics.jsonl."""
        log, deadline = self.run / "metrics.jsonl", time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self.all):
            if log.exists() and f'"step": {step},' in log.read_text():
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} never came: {[self.said(i) for i in range(len(self.all))]}")

    def codes(self, seconds: float = 200) -> list[int]:
        """The exit codes, when all have ended by themselves."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.all]

    def kill(self) -> None:
        for process in self.all:
            process.kill()
            process.wait()


@contextmanager
def started(config: Config, root: Path, count: int = 1, **variables: str) -> Iterator[Processes]:
    """Processes that train, none of which outlives the block."""
    processes = Processes(config, root, count, **variables)
    try:
        yield processes
    finally:
        processes.kill()


def finished(config: Config, root: Path, count: int = 1, **variables: str) -> dict[str, Any]:
    """The summary of a run that ends undisturbed."""
    with started(config, root, count, **variables) as processes:
        codes = processes.codes()
        assert codes == [0] * count, [processes.said(i) for i in range(count)]
    return json.loads((processes.run / "summary.json").read_text())


def digests(summary: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on what happened to a run."""
    return {key: summary[key] for key in DIGESTS}


def _environment(root: Path) -> dict[str, str]:
    """One device for each process; what one compiles is kept for the next."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"XLA_FLAGS": " ".join(flags)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
