"""The candidate stream: the rows of every step, drawn by the plan, read ahead by Grain."""

from collections.abc import Callable, Iterator

import grain
import numpy as np
from jaxtyping import Int

from opus_jax.data.buffers import Buffers
from opus_jax.data.plan import Plan, rows_at
from opus_jax.data.records import RowReader, batch_of
from opus_jax.errors import UserError

Places = Callable[[int], Int[np.ndarray, " n"]]

_UNBOUNDED = 1 << 48


class CandidateStream(Iterator[dict[str, np.ndarray]]):
    """Host batches of consecutive steps; `iter` is the stream itself.

    Row i of step t is a pure function of (seed, t, plan), so threads that read ahead cannot change it, and a stream
    opened at step t is the continuation of any other. A new plan means a new stream from its first step on.

    A batch is a dict of arrays. Of the n rows that this process holds: tokens int32[n, T], segment_ids int32[n, T],
    loss_mask float32[n, T]. Of all N rows of the step, so that every process can keep the accounts of the whole batch
    without asking another: example_id int32[N], domain_id int32[N], document_ids int64[N, S].

    Args:
      buffers: how many rows each step takes, over all processes.
      start_step: the first step delivered.
      held: the places in a batch of so many rows whose tokens this process reads, ascending; None = all.
      threads: how many steps are read at the same time; 0 reads in the calling thread.
      ahead: how many steps may lie ready.

    Raises:
      UserError: `start_step` lies before the plan.
    """

    def __init__(
        self,
        reader: RowReader,
        plan: Plan,
        seed: int,
        buffers: Buffers,
        *,
        start_step: int = 0,
        held: Places | None = None,
        threads: int = 2,
        ahead: int = 4,
    ):
        if buffers.slots_before(start_step) < plan.first_slot:
            raise UserError(f"step {start_step} lies before the plan, which begins at slot {plan.first_slot}")
        self.plan, self._start = plan, start_step
        steps = _Steps(reader, plan, seed, buffers, start_step, held or np.arange)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead if threads else 0)
        self._iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return self._start + int(self._iterator.get_state()["next_index"])

    def state(self) -> dict[str, int]:
        """All that a checkpoint needs beside the plan and the seed: give it back as `start_step`."""
        return {"step": self.step}

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()


class _Steps:
    """Grain's random-access source, one element for every step: a step's rows are read together."""

    def __init__(self, reader: RowReader, plan: Plan, seed: int, buffers: Buffers, first: int, held: Places):
        self._reader, self._plan, self._seed, self._buffers = reader, plan, seed, buffers
        self._first, self._held = first, held

    def __len__(self) -> int:
        return _UNBOUNDED

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step = self._first + int(index)
        rows = self._buffers.rows(step)
        wanted = rows_at(self._plan, self._seed, self._buffers.slots_before(step), rows)
        return batch_of(self._reader.read(wanted[self._held(rows)])) | self._reader.columns(wanted)
