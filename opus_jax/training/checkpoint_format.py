"""The file format of a checkpoint: all that this program asks of Orbax, and the only file that imports it.

A step's folder holds `state` (arrays with shardings), `data` (NumPy arrays) and `meta` (JSON). Orbax writes to
`<step>.orbax-checkpoint-tmp...` and renames that when everything is on disk.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

TEMPORARY = ".orbax-checkpoint-tmp"


def open_checkpointer(directory: Path, keep: int, best: bool) -> ocp.training.Checkpointer:
    """Saves whenever asked; keeps the newest `keep` steps and, when `best`, the one with the lowest metric."""
    return ocp.training.Checkpointer(
        directory,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=_preservation(keep, best),
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


def _preservation(keep: int, best: bool) -> Any:
    policies = ocp.training.preservation_policies
    newest = policies.LatestN(keep)
    if not best:
        return newest
    lowest = policies.BestN(
        get_metric_fn=lambda metrics: metrics["metric"], reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    return policies.AnyPreservationPolicy([newest, lowest])


def _unpack(data: Any, meta: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    envelope = json.loads(meta["json"])
    empty = {name: np.zeros(shape, dtype) for name, (dtype, shape) in envelope["empty"].items()}
    return {name: np.asarray(array) for name, array in (data["arrays"] or {}).items()} | empty, envelope["meta"]
