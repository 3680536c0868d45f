"""What it costs to divide one batch: two data-parallel processes against one, and eight devices of one against one.

The global batch and the mathematics are the same in every arm, so on this machine, whose cores are the same for all, a
ratio above 1 is what collectives, duplicated dispatch and smaller products cost. It says nothing of machines of their
own: there each part has its own cores. The arms are child processes that stay and are timed in turn.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from benchmarks.harness import Figures, alternate, run_benchmark
from opus_jax.config import Config, from_mapping

STEPS_PER_TIMING = 5
KINDS = {"plain": "trains on K rows", "opus": "scores N rows and trains on K"}
ARMS = {"1_process": (1, 1), "2_processes": (2, 1), "8_devices": (1, 8)}  # processes, devices of each
_CHILD = "from benchmarks.processes import work; work()"

Steps = Callable[[str, int], list[float]]


def main() -> None:
    run_benchmark("processes", __doc__ or "", measure)


def measure(quick: bool) -> tuple[dict[str, Any], Figures]:
    figures: Figures = {}
    with ExitStack() as open_arms:
        arms = {name: open_arms.enter_context(_arm(*shape)) for name, shape in ARMS.items()}
        for kind in KINDS:
            first = {name: steps(kind, 1)[0] for name, steps in arms.items()}
            spread = max(first.values()) - min(first.values())
            assert spread < 1e-4, f"the arms do not compute the same loss: {first}"
            for steps in arms.values():
                steps(kind, 2)  # the second call still compiles, for donated buffers
            for name in ("2_processes", "8_devices"):
                one, several = (_timed(arms[arm], kind) for arm in ("1_process", name))
                figures[f"step_time.{kind}.{name}_over_1"] = [*alternate(one, several, pairs=5 if quick else 30)]
    config = _config()
    setting = {
        "model": config.model.preset,
        "rows": config.batch.rows,
        "candidates": config.candidates,
        "row_tokens": config.corpus.row_tokens,
        "steps_per_timing": STEPS_PER_TIMING,
        "steps": KINDS,
        "collectives": "gloo between processes, in memory between devices of one",
        "method_arms": list(figures),
    }
    return setting, figures


def _timed(steps: Steps, kind: str) -> Callable[[], None]:
    def action() -> None:
        steps(kind, STEPS_PER_TIMING)

    return action


@contextmanager
def _arm(processes: int, devices: int) -> Iterator[Steps]:
    """Child processes that work together; what it gives does steps of a kind and returns each child's last loss."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "OPUS_JAX_COORDINATOR": f"localhost:{port}",
        "OPUS_JAX_PROCESSES": str(processes),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD], env=environment | {"OPUS_JAX_PROCESS": str(process)},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for process in range(processes)
    ]  # fmt: skip

    def steps(kind: str, count: int) -> list[float]:
        for child in children:
            print(kind, count, file=child.stdin, flush=True)
        return [_loss(child) for child in children]

    try:
        yield steps
    finally:
        for child in children:
            child.kill()
            child.communicate()


def _loss(child: subprocess.Popen[str]) -> float:
    """What it answers; other lines are the collectives' own."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("loss "):
            return float(line.split()[1])
    raise RuntimeError(f"a child process ended with exit code {child.wait()}")


# ------------------------------------------------------------------------------------------- in a child


def work() -> None:
    """Do what standard input asks for, `KIND STEPS`, until it ends."""
    from opus_jax.distributed.mesh import make_mesh
    from opus_jax.distributed.processes import start_processes
    from opus_jax.models.presets import resolve
    from opus_jax.training.build import optimizer_for
    from opus_jax.training.feed import put_rows
    from opus_jax.training.state import init_state
    from opus_jax.training.step import make_step

    start_processes()
    config = _config()
    mesh, spec = make_mesh(config.mesh), resolve(config.model, 2048, config.corpus.row_tokens)
    optimizer = optimizer_for(spec, config)
    state = {kind: init_state(spec, optimizer, 0, mesh, directed=True) for kind in KINDS}
    step = {kind: make_step(spec, optimizer, config, mesh, chooses=kind == "opus") for kind in KINDS}
    rows = {"plain": _rows(config, config.batch.rows), "opus": _rows(config, config.candidates)}
    proxy = _rows(config, config.proxy.rows)
    for line in sys.stdin:
        kind, count = line.split()
        for _ in range(int(count)):
            target = put_rows(proxy, mesh) if kind == "opus" else None
            state[kind], metrics = step[kind](state[kind], put_rows(rows[kind], mesh), target)
        print("loss", float(metrics["loss"]), flush=True)


def _config() -> Config:
    return from_mapping(
        {
            "model": {"preset": "quickstart"},
            "corpus": {"row_tokens": 128},
            "batch": {"rows": 16},
            "optimizer": {"schedule": "constant", "warmup_steps": 0},
        }
    )


def _rows(config: Config, count: int) -> dict[str, np.ndarray]:
    shape = (count, config.corpus.row_tokens)
    mask = np.ones(shape, np.float32)
    mask[:, 0] = 0
    tokens = np.random.default_rng(count).integers(4, 2048, shape, dtype=np.int32)
    return {"tokens": tokens, "segment_ids": np.ones(shape, np.int32), "loss_mask": mask}


if __name__ == "__main__":
    main()
