"""selection/*.parquet: one row per candidate per step.

Rows are collected and written as parts named by their first and last step, whole or not at all, at the latest at
every checkpoint; so a resumed run can remove exactly the rows after its step.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Shaped

from opus_jax.training.atomic import remove_partial_files, write_atomic

FOLDER = "selection"
SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("position", pa.int32()),
        ("example_id", pa.int64()),
        ("domain_id", pa.int32()),
        ("utility", pa.float32()),
        ("z", pa.float32()),
        ("probability", pa.float32()),
        ("redundancy", pa.float32()),
        ("selected", pa.bool_()),
    ]
)
_ROWS_PER_PART = 1 << 20  # bounds the memory of a run that saves rarely
_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


class SelectionLog:
    """Collects rows and writes parts. For process 0 only.

    Args:
      run_dir: the run folder.
      resume_step: the restored step, 0 for a fresh run; later rows are removed.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0):
        self._folder = Path(run_dir) / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        truncate(run_dir, resume_step)
        self._tables: list[pa.Table] = []
        self._steps: list[int] = []
        self._rows = 0

    def write(self, step: int, arrays: Mapping[str, Shaped[np.ndarray, " N"]]) -> None:
        """Add the N candidates of a step, in buffer order.

        Args:
          arrays: columns by name, all but `step` and `position`; an absent column is null.

        Raises:
          ValueError: a name is not a column, or the columns differ in length.
        """
        unknown = sorted(arrays.keys() - set(SCHEMA.names))
        if unknown:
            raise ValueError(f"not columns of the selection log: {', '.join(unknown)}")
        rows = len(arrays["example_id"])
        columns = {"step": np.full(rows, step), "position": np.arange(rows), **arrays}
        table = pa.table([_column(columns.get(field.name), field.type, rows) for field in SCHEMA], schema=SCHEMA)
        self._tables.append(table)
        self._steps.append(step)
        self._rows += rows
        if self._rows >= _ROWS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Write what was collected: before every checkpoint."""
        if self._tables:
            _write_part(self._folder, pa.concat_tables(self._tables), min(self._steps), max(self._steps))
            self._tables, self._steps, self._rows = [], [], 0

    def close(self) -> None:
        self.flush()


def truncate(run_dir: str | Path, step: int) -> None:
    """Remove the rows of later steps, and unfinished parts."""
    folder = Path(run_dir) / FOLDER
    remove_partial_files(folder)
    for file in sorted(folder.glob("part-*.parquet")):
        match = _PART.fullmatch(file.name)
        if match is None:
            continue
        first, last = int(match[1]), int(match[2])
        if first <= step < last:
            table = pq.read_table(file)
            _write_part(folder, table.filter(pc.less_equal(table["step"], step)), first, step)
        if last > step:
            file.unlink()


def _write_part(folder: Path, table: pa.Table, first: int, last: int) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(folder / f"part-{first:09d}-{last:09d}.parquet", sink.getvalue().to_pybytes())


def _column(values: np.ndarray | None, kind: pa.DataType, rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(rows, kind)
    return pa.array(np.asarray(values).astype(kind.to_pandas_dtype()), kind)
