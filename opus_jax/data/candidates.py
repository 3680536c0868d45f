"""The candidate stream: the rows of every step, drawn by the plan, read ahead by Grain."""

from collections.abc import Iterator

import grain
import numpy as np

from opus_jax.data.buffers import Buffers
from opus_jax.data.plan import Plan, rows_at
from opus_jax.data.records import RowReader, batch_of
from opus_jax.errors import UserError

_UNBOUNDED = 1 << 48


class CandidateStream(Iterator[dict[str, np.ndarray]]):
    """Host batches of consecutive steps; `iter` is the stream itself.

    Row i of step t is a pure function of (seed, t, plan), so threads that read ahead cannot change it, and a stream
    opened at step t is the continuation of any other. A new plan means a new stream from its first step on.

    A batch is a dict of arrays, here of n = N / process_count rows: tokens int32[n, T], segment_ids int32[n, T],
    loss_mask float32[n, T], example_id int32[n], domain_id int32[n], document_ids int64[n, S]. Process p has the
    rows p n to (p + 1) n - 1 of the global batch.

    Args:
      buffers: how many rows each step takes.
      start_step: the first step delivered.
      threads: how many steps are read at the same time; 0 reads in the calling thread.
      ahead: how many steps may lie ready.

    Raises:
      UserError: a step's rows do not divide among the processes, or `start_step` lies before the plan.
    """

    def __init__(
        self,
        reader: RowReader,
        plan: Plan,
        seed: int,
        buffers: Buffers,
        *,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        ahead: int = 4,
    ):
        for rows in (buffers.candidates, buffers.batch):
            if rows % process_count:
                raise UserError(
                    f"{rows} rows of a step (batch.rows, or that / selection.ratio) do not divide among "
                    f"{process_count} processes"
                )
        if buffers.slots_before(start_step) < plan.first_slot:
            raise UserError(f"step {start_step} lies before the plan, which begins at slot {plan.first_slot}")
        self.plan, self._start = plan, start_step
        steps = _Steps(reader, plan, seed, buffers, start_step, process_index, process_count)
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

    def __init__(
        self, reader: RowReader, plan: Plan, seed: int, buffers: Buffers, first: int, process: int, processes: int
    ):
        self._reader, self._plan, self._seed, self._buffers = reader, plan, seed, buffers
        self._first, self._process, self._processes = first, process, processes

    def __len__(self) -> int:
        return _UNBOUNDED

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step = self._first + int(index)
        rows = self._buffers.rows(step)
        wanted = rows_at(self._plan, self._seed, self._buffers.slots_before(step), rows)
        share = rows // self._processes
        return batch_of(self._reader.read(wanted[self._process * share : (self._process + 1) * share]))
