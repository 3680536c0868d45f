"""From the host's candidate stream to the devices, one batch ahead of the step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

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
            self._next = Fed(put_rows(host, self._mesh), host)


def put_rows(host: dict[str, Any], mesh: Mesh) -> Batch:
    """Place this process's rows as its part of a global batch split over the data axes."""
    processes = jax.process_count()
    batch = {}
    for name, dtype in DEVICE_FIELDS.items():
        local = np.asarray(host[name], dtype)
        shape = (local.shape[0] * processes, *local.shape[1:])
        batch[name] = jax.make_array_from_process_local_data(sharding(mesh, ("batch", None), shape), local, shape)
    return batch
