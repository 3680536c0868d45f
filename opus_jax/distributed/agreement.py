"""What several processes must agree on before they go on together: through JAX's coordination service, not its devices.

Everything here does nothing for a process that is alone. All processes call these functions in the same order.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from opus_jax.errors import UserError

# One process may prepare a corpus for hours while the others wait; that one of them dies is noticed within minutes.
_PATIENCE_MS = 24 * 3600 * 1000
_calls = itertools.count()


@contextmanager
def same_fate() -> Iterator[None]:
    """If one process fails with a UserError in the block, all do: none is left waiting for another that has gone."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    said = _gathered(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for process, message in enumerate(said):
        if message is not None:
            raise UserError(f"process {process} of {len(said)}: {message}")


def require_same(what: str, value: str) -> None:
    """Raise UserError, in every process, where they differ in something.

    Args:
      what: says what it is and what to do, for a person.
    """
    found = _gathered(value)
    other = [process for process, theirs in enumerate(found) if theirs != found[0]]
    if other:
        raise UserError(f"processes {', '.join(map(str, other))} of {len(found)} differ from process 0 in {what}")


def of_first(value: Callable[[], Any]) -> Any:
    """What process 0 finds, as JSON: for what depends on files that are being written."""
    return _gathered(value() if jax.process_index() == 0 else None)[0]


def require_one_history(*parts: Any) -> None:
    """Raise RuntimeError where the processes have come to other results: before a checkpoint is made of them.

    Every process keeps the accounts and makes the plans by itself, from the same numbers. That they differ means that
    a machine computes wrongly, or that the machines are of different kinds.

    Args:
      parts: strings, and mappings of names to arrays.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    for part in parts:
        for name, value in sorted(part.items()) if isinstance(part, dict) else [("", part)]:
            digest.update(f"{name}:".encode())
            digest.update(value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes())
    found = multihost_utils.process_allgather(np.frombuffer(digest.digest(), np.uint8))
    other = np.flatnonzero((found != found[0]).any(axis=1)).tolist()
    if other:
        raise RuntimeError(
            f"processes {other} of {len(found)} have other losses, batches or plans than process 0 since the last "
            "checkpoint, which is good: replace those machines, or use machines of one kind"
        )


def _gathered(value: Any) -> list[Any]:
    """The values of all processes, in order.

    Process 0, in which the service runs, returns last: where it then ends, the others have heard why.
    """
    processes, me = jax.process_count(), jax.process_index()
    if processes == 1:
        return [value]
    client, key = coordination_client(), f"opus_jax/{next(_calls)}"
    client.key_value_set(f"{key}/said/{me}", json.dumps(value))
    found = [json.loads(client.blocking_key_value_get(f"{key}/said/{p}", _PATIENCE_MS)) for p in range(processes)]
    if me != 0:
        client.key_value_set(f"{key}/heard/{me}", "")
        return found
    for process in range(1, processes):
        client.blocking_key_value_get(f"{key}/heard/{process}", _PATIENCE_MS)
    client.key_value_delete(key)
    return found


def coordination_client() -> Any:
    """JAX's client of the service that runs in process 0: keys and values that all processes see."""
    from jax._src.distributed import global_state  # the service has no public name

    if global_state.client is None:
        raise UserError(
            "several processes without JAX's coordination service: call "
            "opus_jax.distributed.processes.start_processes(), or jax.distributed.initialize(), first"
        )
    return global_state.client
