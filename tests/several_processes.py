"""Starting one program in several processes of this machine that belong together, and seeing all of them end."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from opus_jax.config import Config

LIMIT_SECONDS = 600  # a quiet machine needs a tenth


def start(
    count: int, *arguments: str, devices: int = 1, compiled: Path | None = None, **variables: str
) -> list[subprocess.Popen[str]]:
    """Python with these arguments, in so many processes of so many CPU devices each.

    Args:
      arguments: `{process}` in one of them becomes the number of the process.
      compiled: where what they compile is kept for the next start.
    """
    if count > 1:
        variables |= {"OPUS_JAX_COORDINATOR": f"localhost:{free_port()}", "OPUS_JAX_PROCESSES": str(count)}
    each = [variables | ({"OPUS_JAX_PROCESS": str(process)} if count > 1 else {}) for process in range(count)]
    return [
        start_one(process, *arguments, devices=devices, compiled=compiled, **its) for process, its in enumerate(each)
    ]


def start_one(
    process: int, *arguments: str, devices: int = 1, compiled: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """One of them; `variables` say how it finds the others."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}
    if compiled is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, *(word.replace("{process}", str(process)) for word in arguments)]
    return subprocess.Popen(
        command, env=environment | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ends(processes: list[subprocess.Popen[str]], limit: float = LIMIT_SECONDS) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each; all are killed when one takes too long, or at any other failure here."""
    deadline = time.monotonic() + limit
    try:
        outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def train(config: Config, root: Path, count: int) -> list[str]:
    """Run `opus-jax train` to its end in so many processes; what each wrote to standard error."""
    file = root / f"{Path(config.run.dir or '').name}.yaml"
    config.save(file)
    found = ends(start(count, "-m", "opus_jax", "train", str(file), compiled=root / "compiled"))
    errors = [error for _, _, error in found]
    assert [code for code, _, _ in found] == [0] * count, "\n".join(errors)
    return errors


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
