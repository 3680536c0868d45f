"""One file of records: any row read alone, and what becomes of a row that cannot be read."""

import threading
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from opus_jax.errors import UserError

AGAIN = "delete the folder and run opus-jax prepare again"
_FAILURES = (RuntimeError, ValueError, IndexError)


class Shard:
    """The rows of one file, by their place in it. Safe to use from several threads.

    Args:
      rows: how many the manifest states.
      first_row: of the split; for messages.
      lenient: a row that cannot be read is a record of zeros (no segment, no target), instead of an error.

    Raises:
      UserError: the file cannot be opened or holds other rows. With `lenient` all its rows are such that cannot be
        read.
    """

    def __init__(self, file: Path, rows: int, first_row: int, dtype: np.dtype, *, lenient: bool):
        self._file, self._first, self._dtype, self._lenient = file, first_row, dtype, lenient
        self._lock = threading.Lock()
        self._reader: ArrayRecordReader | None = None
        try:
            self._reader = _open(file, rows)
        except UserError:
            if not lenient:
                raise

    def read(self, places: list[int]) -> np.ndarray:
        """Records, in the order asked for.

        Raises:
          UserError: a row is damaged; the message names file and row.
        """
        try:
            return self._decoded(places)
        except _FAILURES:
            return np.concatenate([self._read_one(place) for place in places])

    def _read_one(self, place: int) -> np.ndarray:
        try:
            return self._decoded([place])
        except _FAILURES as error:
            if self._lenient:
                return np.zeros(1, self._dtype)
            raise UserError(
                f"{self._file} is damaged at row {self._first + place}, its row {place} ({_reason(error)}): {AGAIN}, "
                "or train without such rows: corpus.lenient=true"
            ) from None

    def _decoded(self, places: list[int]) -> np.ndarray:
        if self._reader is None:
            raise ValueError("the file could not be opened")
        with self._lock:
            raw = self._reader.read(places)
        return np.frombuffer(b"".join(raw), self._dtype)


def _open(file: Path, rows: int) -> ArrayRecordReader:
    try:
        reader = ArrayRecordReader(str(file), "readahead_buffer_size:0")
        found = reader.num_records()
    except _FAILURES as error:
        raise UserError(f"{file} is damaged ({_reason(error)}): {AGAIN}") from None
    if found != rows:
        raise UserError(f"{file} holds {found} rows, the manifest says {rows}: {AGAIN}")
    return reader


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
