"""One trainer per run folder.

The kernel's lock on the file `lock` goes when its process dies, however it dies, so a lock of a dead process on this
machine is taken over at once. On a shared disk another machine may not see that lock; it sees the holder's name in
the file, and that its time is refreshed as long as the holder lives. Whether it is, is watched for a while: the age of
the file would be a comparison of two machines' clocks, either of which can be wrong or be set.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from opus_jax.errors import UserError

NAME = "lock"
_REFRESH_SECONDS = 30.0
_STALE_SECONDS = 100.0  # longer than three times the above


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run folder.

    Raises:
      UserError: a living process holds it; the message names process and machine.
    """
    file = run_dir / NAME
    with file.open("a+") as handle:
        _take(file, handle)
        released = threading.Event()
        thread = threading.Thread(target=_refresh, args=(file, released), daemon=True, name="run lock")
        thread.start()
        try:
            yield
        finally:
            released.set()
            thread.join()
            handle.truncate(0)


def _take(file: Path, handle: TextIO) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(file) from None
    holder = _holder(file)
    here = socket.gethostname()
    if holder and holder["host"] != here and _is_refreshed(file):
        raise _held(file)
    handle.truncate(0)
    handle.write(json.dumps({"host": here, "pid": os.getpid()}))
    handle.flush()


def _is_refreshed(file: Path) -> bool:
    """Whether the file's time changes within `_STALE_SECONDS`; waits until it does."""
    before, start = file.stat().st_mtime_ns, time.monotonic()
    print(f"{file} names a process of another machine: waiting to see whether it lives", file=sys.stderr, flush=True)
    while time.monotonic() - start < _STALE_SECONDS:
        time.sleep(min(1.0, _REFRESH_SECONDS))
        if file.stat().st_mtime_ns != before:
            return True
    return False


def _held(file: Path) -> UserError:
    holder = _holder(file)
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return UserError(f"{who} is training in {file.parent}: wait for it, stop it, or choose another run.dir")


def _holder(file: Path) -> dict[str, str | int]:
    try:
        holder = json.loads(file.read_text())
        return holder if {"host", "pid"} <= holder.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _refresh(file: Path, released: threading.Event) -> None:
    while not released.wait(_REFRESH_SECONDS):
        try:
            os.utime(file)
        except OSError:  # a lock file deleted by hand is the user's wish
            return
