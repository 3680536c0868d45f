"""One trainer per run folder.

The kernel's lock on the file `lock` goes when its process dies, however it dies, so a lock of a dead process on this
machine is taken over at once. On a shared disk another machine may not see that lock; it sees the holder's name in
the file, and that its time is refreshed as long as the holder lives.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from opus_jax.errors import UserError

NAME = "lock"
_REFRESH_SECONDS = 30.0
_STALE_SECONDS = 180.0


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
    if holder and holder["host"] != here and time.time() - file.stat().st_mtime < _STALE_SECONDS:
        raise _held(file)
    handle.truncate(0)
    handle.write(json.dumps({"host": here, "pid": os.getpid()}))
    handle.flush()


def _held(file: Path) -> UserError:
    holder = _holder(file)
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return UserError(
        f"{who} is training in {file.parent}: wait for it, stop it, or choose another run.dir "
        f"(if it is dead, its lock is given up {_STALE_SECONDS:.0f} seconds after its end)"
    )


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
