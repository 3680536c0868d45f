"""Starting the processes of a run together: who they are is `group.py`'s, that all of them come is seen to here.

The command line calls `start_processes` before anything touches a device. What is said goes to standard error.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from opus_jax.distributed.group import PROCESSES, Group, recognise, slices
from opus_jax.errors import JoinError, UserError

JOIN_SECONDS = "OPUS_JAX_JOIN_SECONDS"
DEFAULT_JOIN_SECONDS = 1800.0  # machines of a large slice come up minutes apart
BEAT_SECONDS = 30.0
LEAVE_SECONDS = 60  # a process that ends waits so long for the others to end too
FAILED = 1  # exit code: trying again may help

_MARGIN_SECONDS = 300  # JAX aborts with a stack when its own time is over: ours ends before


def start_processes() -> None:
    """Join the processes that this one belongs to; return at once if it belongs to none, or has joined already.

    Waits for the others, and says so. If they do not all come in time the process ends here with exit code 1: JAX
    waits in a call that nothing can interrupt.

    Raises:
      JoinError: there is no coordinator, or it does not take this process.
      UserError: see `group.recognise`; the time to wait is no number; other processes or slices came than were said.
    """
    if jax.distributed.is_initialized():
        return
    group = recognise()
    if group is None:
        return
    seconds = _join_seconds()
    _say(f"process {group.process} of {group.processes} (from 0), recognised by {group.recognised}{_of_slices()}")
    started = time.monotonic()
    with _watch(group, seconds) as found:
        found.append(_coordinator(group, seconds))
        _say(f"coordinator {found[0]}; waiting up to {seconds:.0f} s for all processes ({JOIN_SECONDS} changes it)")
        _initialize(group, found[0], seconds)
        _refuse_other_devices(group)
    local, devices = jax.local_device_count(), jax.devices()
    _say(
        f"all {group.processes} processes are here after {time.monotonic() - started:.0f} s: {len(devices)} "
        f"{devices[0].device_kind} devices, {local} of them in this process"
    )


def _initialize(group: Group, coordinator: str, seconds: float) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            group.processes,
            group.process,
            local_device_ids=group.local_device,
            cluster_detection_method="deactivate",
            initialization_timeout=int(seconds) + _MARGIN_SECONDS,
            shutdown_timeout_seconds=LEAVE_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise JoinError(
            f"process {group.process} of {group.processes} cannot join the others at {coordinator} ({reason}): see "
            "that the port is free on the machine of process 0 and open in its firewall, or choose another"
        ) from error


def _coordinator(group: Group, seconds: float) -> str:
    try:
        return group.coordinator(seconds)
    except RuntimeError as error:
        raise JoinError(f"process {group.process} of {group.processes} finds no coordinator: {error}") from error


def _refuse_other_devices(group: Group) -> None:
    """What was said of the machines must be what JAX sees of them."""
    if jax.process_count() != group.processes:
        raise UserError(
            f"{group.recognised} says {group.processes} processes, but JAX sees {jax.process_count()}: start the "
            f"command on every worker, or correct {PROCESSES}"
        )
    seen = {getattr(device, "slice_index", 0) for device in jax.devices()}
    if jax.devices()[0].platform == "tpu" and len(seen) != slices():
        raise UserError(
            f"MEGASCALE_NUM_SLICES says {slices()} slices, but JAX sees {len(seen)}: unset the MEGASCALE_* variables "
            "that an earlier run has left, or start the command on every slice"
        )


# ------------------------------------------------------------------------------------------------ waiting


@contextmanager
def _watch(group: Group, seconds: float) -> Iterator[list[str]]:
    """Say every half minute what is waited for, and end the process when the time is over.

    The list takes the coordinator's address as soon as it is known.
    """
    found: list[str] = []
    joined = threading.Event()
    thread = threading.Thread(target=_wait, args=(group, seconds, found, joined), daemon=True, name="join")
    thread.start()
    try:
        yield found
    finally:
        joined.set()
        thread.join()


def _wait(group: Group, seconds: float, found: list[str], joined: threading.Event) -> None:
    begun = time.monotonic()
    while not joined.wait(min(BEAT_SECONDS, begun + seconds - time.monotonic())):
        waited = time.monotonic() - begun
        where = found[0] if found else "a coordinator whose name is not known yet"
        if waited < seconds:
            _say(f"still waiting for the other processes at {where}, {waited:.0f} s{_state(group, found)}")
            continue
        _say(
            f"not all of the {group.processes} processes came to {where} in {seconds:.0f} s{_state(group, found)}: "
            f"see that the command runs {group.processes} times with different numbers, that no process ended early "
            "(its log says why), and that every machine reaches that address through its firewall"
        )
        os._exit(FAILED)


def _state(group: Group, found: list[str]) -> str:
    """Which of the two is missing, the coordinator or others, as far as this process can tell."""
    if not found or group.process == 0:
        return ""
    host, _, port = found[0].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f" (process 0 does not answer there: {error.strerror or error})"
    return " (process 0 answers, so others are missing)"


def _join_seconds() -> float:
    value = os.environ.get(JOIN_SECONDS)
    try:
        seconds = DEFAULT_JOIN_SECONDS if value is None else float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"{JOIN_SECONDS}={value!r}: must be a number of seconds above 0")
    return seconds


def _of_slices() -> str:
    return f", {slices()} slices" if slices() > 1 else ""


def _say(line: str) -> None:
    print(f"opus-jax: {line}", file=sys.stderr, flush=True)
