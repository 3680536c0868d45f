"""Many runs at once, one single-threaded process per core; what is finished is read and not done again."""

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.efficiency.runs import Run, kept, sources_digest
from benchmarks.efficiency.worker import ask
from opus_jax.data.prepare import prepare
from opus_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RUNS_PER_PROCESS = 40
HASTE = "--xla_backend_optimization_level=0"  # of short runs, which compile longer than they compute
DIVERGED = "NonFiniteLossError"


class BenchmarkError(UserError):
    """A run failed, or cannot be compared with the others."""


@dataclass(frozen=True)
class Workplace:
    """Where runs lie and how many are made at once.

    Attributes:
      work: folder of the run folders, of logs and of compiled steps.
      reuse: read finished runs that other source code made.
      hasty: compile for haste.
    """

    work: Path
    workers: int = field(default_factory=lambda: len(cores()))
    reuse: bool = False
    hasty: bool = False


def cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def run_all(runs: Sequence[Run], place: Workplace, *, may_diverge: bool = False) -> dict[Run, dict[str, Any] | None]:
    """Results of all runs, in order.

    Args:
      may_diverge: a run whose loss is not finite gives None instead of an error.

    Raises:
      BenchmarkError: a run failed (the message names it and its log), or was made by other source code.
    """
    folders = {run: place.work / run.name for run in dict.fromkeys(runs)}
    found = {run: kept(folder) for run, folder in folders.items()}
    _refuse_other_sources(found, place)
    missing = [run for run in folders if found[run] is None]
    print(f"{len(folders)} runs, {len(folders) - len(missing)} of them finished before", file=sys.stderr, flush=True)
    if missing:
        _prepare_corpora(missing)
        found |= _Pool(missing, folders, place, may_diverge).results()
    return found


def _refuse_other_sources(found: dict[Run, dict[str, Any] | None], place: Workplace) -> None:
    others = [run.name for run, result in found.items() if result is not None and result["sources"] != sources_digest()]
    if others and not place.reuse:
        raise BenchmarkError(
            f"{len(others)} finished runs below {place.work} were made by other source code (first: {others[0]}): "
            "delete them, choose another --work, or read them all the same with --reuse"
        )


def _prepare_corpora(runs: Sequence[Run]) -> None:
    """Once, with all cores: the workers have one each."""
    for config in {str(run.config.corpus.noise): run.config for run in runs}.values():
        prepare(config)


class _Pool:
    """Hands runs to worker processes; each thread here waits for one of them."""

    def __init__(self, runs: Sequence[Run], folders: dict[Run, Path], place: Workplace, may_diverge: bool):
        self._folders, self._place, self._may_diverge = folders, place, may_diverge
        self._orders: queue.SimpleQueue[Run] = queue.SimpleQueue()
        for run in runs:
            self._orders.put(run)
        self._results: dict[Run, dict[str, Any] | None] = {}
        self._failure: str | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._progress = _Remaining(runs, place.workers)

    def results(self) -> dict[Run, dict[str, Any] | None]:
        own = cores()
        threads = [
            threading.Thread(target=self._serve, args=(i, own[i % len(own)]), daemon=True)
            for i in range(self._place.workers)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)  # so that Ctrl-C is heard
        finally:
            self._stop.set()
            self._end_processes()
        if self._failure is not None:
            raise BenchmarkError(self._failure)
        if self._progress.left:
            raise BenchmarkError(
                f"{len(self._progress.left)} runs were not made, the first {self._progress.left[0].name}"
            )
        return self._results

    def _serve(self, place: int, core: int) -> None:
        served, worker = 0, None
        while not self._stop.is_set():
            try:
                run = self._orders.get_nowait()
            except queue.Empty:
                break
            if worker is None or served % RUNS_PER_PROCESS == 0:
                worker = self._start_process(place, core)
            served += 1
            self._take(run, worker, self._log(place))
        if worker is not None and worker.stdin is not None:
            worker.stdin.close()

    def _take(self, run: Run, worker: "subprocess.Popen[str]", log: Path) -> None:
        folder, start = self._folders[run], time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was not finished
        assert worker.stdin is not None
        assert worker.stdout is not None
        answer = ask(worker.stdin, worker.stdout, {"folder": str(folder), "config": run.config.to_mapping()})
        with self._lock:
            if self._stop.is_set():
                return
            result = answer.get("result")
            if result is None and not (self._may_diverge and answer["error"] == DIVERGED):
                self._failure = f"run {run.name} failed ({answer['error']}: {answer['message']}): see {log}"
                self._stop.set()
                return
            self._results[run] = result
            said = "diverged" if result is None else f"{result['final_bpb']:.4f} bpb"
            self._progress.say(run, said, time.perf_counter() - start)

    def _log(self, place: int) -> Path:
        return self._place.work / "logs" / f"worker-{place}.log"

    def _start_process(self, place: int, core: int) -> "subprocess.Popen[str]":
        log = self._log(place)
        log.parent.mkdir(parents=True, exist_ok=True)
        if (old := self._processes.get(place)) is not None:
            _end(old)
        with log.open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.efficiency.worker", str(core)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
                env=_environment(self._place), start_new_session=True,  # Ctrl-C is for the parent, which ends them
            )  # fmt: skip
        self._processes[place] = process
        return process

    def _end_processes(self) -> None:
        for process in self._processes.values():
            if self._failure is not None or process.stdin is None or not process.stdin.closed:
                process.terminate()
        for process in self._processes.values():
            _end(process)


class _Remaining:
    """A line for every finished run, with an estimate of the time left: the arm's mean, else the mean of all."""

    def __init__(self, runs: Sequence[Run], workers: int):
        self.left, self._all, self._workers = list(runs), len(runs), workers
        self._seconds: dict[str, list[float]] = {}

    def say(self, run: Run, said: str, seconds: float) -> None:
        self.left.remove(run)
        self._seconds.setdefault(run.arm, []).append(seconds)
        done = self._all - len(self.left)
        left = self.estimate() / 60
        print(
            f"[{done:3}/{self._all}] {run.mix} {run.setting:8} {run.arm:18} seed {run.seed}: {said} "
            f"in {seconds:.0f} s; about {left:.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    def estimate(self) -> float:
        """Seconds."""
        known = [x for values in self._seconds.values() for x in values]
        anything = sum(known) / len(known)
        means = {arm: sum(values) / len(values) for arm, values in self._seconds.items()}
        return sum(means.get(run.arm, anything) for run in self.left) / self._workers


def _end(process: "subprocess.Popen[str]") -> None:
    if process.stdin is not None and not process.stdin.closed:
        process.stdin.close()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment(place: Workplace) -> dict[str, str]:
    """One thread each, compiled steps kept on disk, freed memory kept by the process (each step needs it again)."""
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen=false", HASTE if place.hasty else ""]
    own = {
        "XLA_FLAGS": " ".join(filter(None, flags)),
        "OMP_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(place.work.resolve() / ("compiled-hasty" if place.hasty else "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    }
    return dict(os.environ) | own
