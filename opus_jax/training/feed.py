"""From the host's candidate stream to the devices, one batch ahead of the step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from opus_jax.distributed.axes import sharding
from opus_jax.training.batches import Batch

DEVICE_FIELDS = {"tokens": np.int32, "segment_ids": np.int32, "loss_mask": np.float32}


@dataclass(frozen=True)
class Fed:
    """One batch: on the devices (what the model reads), and on the host (what the logs need)."""

    device: Batch
    host: dict[str, np.ndarray]


class Feed:
    """Reads rows while the devices work: `ahead()` after a step is dispatched, `take()` before the next."""

    def __init__(self, stream: Iterator[dict[str, np.ndarray]], mesh: Mesh):
        self._stream, self._mesh = stream, mesh
        self._next: Fed | None = None
        self.waited = 0.0  # seconds spent waiting for rows since `take` was last called

    def take(self) -> Fed:
        self.ahead()
        fed, self._next = self._next, None
        assert fed is not None
        return fed

    def ahead(self) -> None:
        if self._next is None:
            start = time.perf_counter()
            host = next(self._stream)
            self.waited = time.perf_counter() - start
            self._next = Fed(put_rows(host, self._mesh, len(host["example_id"])), host)


def put_rows(host: dict[str, Any], mesh: Mesh, rows: int | None = None) -> Batch:
    """Place a batch split over the data axes.

    Args:
      rows: of the whole batch, of which `host` has those of `rows_held`; None = it has them all.
    """
    batch = {}
    for name, dtype in DEVICE_FIELDS.items():
        local = np.asarray(host[name], dtype)
        shape = (len(local) if rows is None else rows, *local.shape[1:])
        split = sharding(mesh, ("batch", None), shape)
        if jax.process_count() == 1:
            batch[name] = jax.device_put(local, split)
            continue
        places = np.arange(len(local)) if rows is None else rows_held(mesh, rows)
        batch[name] = jax.make_array_from_callback(shape, split, partial(_at, local, places, shape[0]))
    return batch


@cache
def rows_held(mesh: Mesh, rows: int) -> Int[np.ndarray, " n"]:
    """The places in a batch of so many rows that lie on this process's devices, ascending.

    They follow from the mesh alone: neighbours in it need not be on one host, and rows that several hosts hold (each a
    part of the model) are read by each.
    """
    split = sharding(mesh, ("batch",), (rows,))
    parts = [np.arange(*at[0].indices(rows)) for at in split.addressable_devices_indices_map((rows,)).values() if at]
    return np.unique(np.concatenate(parts))


def _at(local: np.ndarray, places: np.ndarray, rows: int, index: tuple[slice, ...]) -> np.ndarray:
    """The rows of one device, out of those that the process holds."""
    first, end, _ = index[0].indices(rows)
    begin = int(np.searchsorted(places, first))
    return local[begin : begin + end - first]
