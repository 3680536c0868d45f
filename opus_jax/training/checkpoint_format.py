"""The file format of a checkpoint: all that this program asks of Orbax, and the only file that imports it.

A step's folder holds `state` (arrays with shardings), `data` (NumPy arrays) and `meta` (JSON). Orbax writes to
`<step>.orbax-checkpoint-tmp...` and renames that when everything is on disk.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import types as serialization  # v1 has no public name for these

TEMPORARY = ".orbax-checkpoint-tmp"

# Orbax measures how long a save takes by a clock that can be set, so that a jump of it would fail the save; that a save
# hangs is for the run's watchdog to notice.
_NEVER_SECONDS = 10 * 365 * 24 * 3600


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay: the newest of all, the newest `count` of the lasting, and if wanted the best.

    Attributes:
      lasting: of a step; a checkpoint of any other step goes when the next one is there.
      best: whether the one with the lowest metric stays.
    """

    count: int
    best: bool
    lasting: Callable[[int], bool]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks this, oldest first, when a save is on its way."""
        lasting = [info.step for info in checkpoints if self.lasting(info.step)]
        kept = {*lasting[-self.count :], *(info.step for info in checkpoints[-1:])}
        measured = [info for info in checkpoints if info.metrics]
        if self.best and measured:
            kept.add(min(measured, key=lambda info: (info.metrics["metric"], -info.step)).step)
        return [info.step in kept for info in checkpoints]


class _LimitedTransfers(serialization.DefaultSerializationStatusCallback):
    """Without it every array is copied at once, whatever the limit."""

    def key_priority(self, _: Any) -> serialization.TransferPriority:
        return serialization.TransferPriority.ASYNCHRONOUS_PRIORITIZED


def open_checkpointer(directory: Path, keeping: Keeping, host_bytes: int | None) -> ocp.training.Checkpointer:
    """Saves whenever asked.

    Args:
      host_bytes: how much of the state a process copies off its devices at a time, and one array at least; the state
        must not change before the save has ended. None = all of it at once, and then the state may change.
    """
    context = ocp.Context()
    context.asynchronous.timeout_secs = _NEVER_SECONDS
    if host_bytes is not None:
        context.memory.transfer_concurrent_bytes = host_bytes
        context.memory.serialization_status_callback = _LimitedTransfers()
    return ocp.training.Checkpointer(
        directory,
        context=context,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=keeping,
    )


def pack(state: Any, data: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, Any]:
    """What one step saves.

    The array store would make an array of each number in `meta`, so that goes as one text; and it refuses empty
    arrays, so their types and shapes go with the text.
    """
    arrays = {name: np.asarray(array) for name, array in data.items()}
    empty = {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items() if a.size == 0}
    stored = {name: array for name, array in arrays.items() if array.size}
    text = json.dumps({"meta": meta, "empty": empty})
    return {"state": state, "data": {"arrays": stored}, "meta": {"json": text}}


def state_reader(abstract_state: Any) -> Callable[[Path], tuple[Any, dict[str, np.ndarray], dict[str, Any]]]:
    """A function of a step's folder that returns (state, data, meta), the state as `abstract_state` wants it."""

    def read(folder: Path) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
        loaded = ocp.load_checkpointables(folder, {"state": abstract_state, "data": None, "meta": None})
        return loaded["state"], *_unpack(loaded["data"], loaded["meta"])

    return read


def read_params(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, meta); nothing else of the state is read."""
    saved = ocp.checkpointables_metadata(folder).metadata["state"]
    wanted = {
        name: jax.tree.map(lambda leaf, own=name == "params": np.empty(0, leaf.dtype) if own else ocp.PLACEHOLDER, part)
        for name, part in saved.items()
    }
    loaded = ocp.load_checkpointables(folder, {"state": wanted, "data": None, "meta": None})
    return loaded["state"]["params"], _unpack(loaded["data"], loaded["meta"])[1]


def quiet_orbax() -> None:
    """Its failures reach the caller as exceptions; its log would bury the one line that says what to do."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


def _unpack(data: Any, meta: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    envelope = json.loads(meta["json"])
    empty = {name: np.zeros(shape, dtype) for name, (dtype, shape) in envelope["empty"].items()}
    return {name: np.asarray(array) for name, array in (data["arrays"] or {}).items()} | empty, envelope["meta"]
