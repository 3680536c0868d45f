"""What is left to do when another process of the run has gone: say so, and end before anything waits for it.

JAX's own check notices a process that is gone, or whose machine is, within 100 seconds, and ends the others. A broken
connection is noticed at once, as an error of the computation that needed it.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from opus_jax.distributed.agreement import coordination_client
from opus_jax.errors import LostProcessError

_LEAVE_SECONDS = 5.0


@contextmanager
def needing_all_processes() -> Iterator[None]:
    """Raise LostProcessError for a computation that fails in the block, where the run has several processes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise lost_process(error) from error


def lost_process(error: BaseException) -> LostProcessError:
    """What to say of an operation of several processes that has failed."""
    reason = " ".join(str(error).split())[:300]
    return LostProcessError(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on: another process has probably ended (the "
        f"log of the first that did says why; here: {reason}): start all of them again, they go on from the newest "
        "checkpoint"
    )


def leave_at_once(code: int, said: str = "", *, together: bool = False) -> None:
    """End a process that has failed, saying why, where it is one of several; return where it is alone.

    The orderly end would wait for all the others, and then abort with a stack instead of this exit code.

    Args:
      together: the others have heard the same reason and are leaving too.
    """
    if jax.distributed.is_initialized():
        print(said, end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        if together:
            _last_of_all()
        os._exit(code)


def _last_of_all() -> None:
    """Process 0 waits a little for the others: without its service they abort before they have said why they end."""
    client, me = coordination_client(), jax.process_index()
    if me != 0:
        client.key_value_set(f"opus_jax/leaving/{me}", "")
        return
    end = time.monotonic() + _LEAVE_SECONDS
    for process in range(1, jax.process_count()):
        try:
            left = max(int(1000 * (end - time.monotonic())), 1)
            client.blocking_key_value_get(f"opus_jax/leaving/{process}", left)
        except jax.errors.JaxRuntimeError:
            return
