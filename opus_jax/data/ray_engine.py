"""Running tasks on a Ray cluster, through Ray Data: `prepare.engine = ray`."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from opus_jax.errors import MissingExtraError, UserError

Item = TypeVar("Item")


def run_on_ray(task: Callable[[Item], None], items: list[Item]) -> Iterator[None]:
    """Run `task` for every item, one block of a Ray dataset each; yields as they are done, in any order.

    The cluster is the one at $RAY_ADDRESS (`auto`: the one that this machine belongs to); without it, one is started
    here for the time of the call. Tasks whose worker or machine died run again, any number of times.

    Raises:
      MissingExtraError: Ray is not installed.
      UserError: raised by a task, or there is no cluster at the address.
    """
    if not items:
        return
    with _cluster() as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False

        def run(row: dict[str, Any]) -> dict[str, str]:
            try:
                task(items[row["id"]])
            except UserError as error:  # Ray would wrap it beyond recognition
                return {"mistake": str(error)}
            return {"mistake": ""}

        done = ray.data.range(len(items), override_num_blocks=len(items)).map(run, num_cpus=1)
        for row in done.iter_rows():
            if row["mistake"]:
                raise UserError(row["mistake"])
            yield


@contextmanager
def _cluster() -> Iterator[Any]:
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS") or "local"
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address} ({error}): ray status shows what runs") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def require_ray() -> None:
    """Raise MissingExtraError where Ray is not installed; asked before any time is spent."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("prepare.engine = ray", "ray[data]", "ray")


def _ray() -> Any:
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine unasked
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
