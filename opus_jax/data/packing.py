"""Packing documents into rows of T tokens.

A row is made of segments. A segment is BOS and a chunk of one document; the document's last segment also ends with
EOS. A document that does not fit is cut at the row's end and goes on in the next row. The layout depends on the
documents' lengths only, so it is made first (it tells the number of rows), and the rows are filled later.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

MIN_SEGMENT = 8  # a shorter rest of a row is padding, unless a whole document fits in it


@dataclass(frozen=True, eq=False)
class Layout:
    """Where every chunk of every document goes; P segments, in row order.

    Attributes:
      document: int64[P], position in the list of lengths.
      start: int64[P], first token of the chunk within its document.
      length: int64[P], tokens of the chunk, without BOS and EOS.
      last: bool[P], the segment ends with EOS.
      row: int64[P].
      column: int64[P], place of the segment's BOS in its row.
      rows: number of rows.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    last: np.ndarray
    row: np.ndarray
    column: np.ndarray
    rows: int

    @property
    def tokens(self) -> int:
        """Places of rows that are not padding, BOS and EOS among them."""
        return int(self.length.sum() + len(self.length) + self.last.sum())


def segments_per_row(row_tokens: int) -> int:
    """S, the most segments a row may hold."""
    return max(1, min(64, row_tokens // MIN_SEGMENT))


def lay_out(lengths: Sequence[int] | Int[np.ndarray, " documents"], row_tokens: int) -> Layout:
    """Place documents of the given token counts, in order, greedily, into rows of `row_tokens`."""
    limit = segments_per_row(row_tokens)
    segments = array("q")  # a list of tuples would take five times the memory
    row, column, used = 0, 0, 0
    for document, total in enumerate(lengths):
        start, done = 0, False
        while not done:
            chunk, done = _fit(int(total) - start, row_tokens - column, column == 0)
            if chunk is None or used == limit:
                row, column, used, done = row + 1, 0, 0, False
                continue
            segments.extend((document, start, chunk, done, row, column))
            start, column, used = start + chunk, column + 1 + chunk + done, used + 1
    table = np.array(segments, np.int64).reshape(-1, 6).T.copy()
    return Layout(table[0], table[1], table[2], table[3].astype(bool), table[4], table[5], rows=row + (column > 0))


def _fit(left: int, room: int, empty: bool) -> tuple[int | None, bool]:
    """Tokens of a document's rest that go into the row, and whether they end it; None = start another row."""
    if left + 2 <= room:
        return left, True
    if room < MIN_SEGMENT and not empty:
        return None, False
    # The last segment must keep one token at least, so EOS never stands alone.
    return min(room - 1, left - 1), False


def record_dtype(row_tokens: int, segments: int) -> np.dtype:
    """One record: fixed size, little endian, so `tobytes` and `frombuffer` are its whole encoding."""
    fields = [
        ("tokens", "<i4", (row_tokens,)),
        ("segment_ids", "<i4", (row_tokens,)),
        ("loss_mask", "u1", (row_tokens,)),
    ]
    return np.dtype([*fields, ("example_id", "<i8"), ("domain_id", "<i4"), ("document_ids", "<i8", (segments,))])


def fill_rows(
    layout: Layout,
    tokens: np.ndarray,
    offsets: Int[np.ndarray, " documents"],
    document_ids: Int[np.ndarray, " documents"],
    row_tokens: int,
    first: int,
    count: int,
    special: tuple[int, int, int],
) -> np.ndarray:
    """Records of rows `first` to `first + count` of a layout; example_id and domain_id are left to the caller.

    Args:
      tokens: int[...], all documents' tokens in one flat array; `offsets` says where each begins.
      special: the ids of BOS, EOS and PAD.
    """
    bos, eos, pad = special
    records = np.zeros(count, record_dtype(row_tokens, segments_per_row(row_tokens)))
    records["tokens"] = pad
    records["document_ids"] = -1
    low, high = np.searchsorted(layout.row, [first, first + count])
    place, before = 0, -1
    for i in range(low, high):
        row, column, length = int(layout.row[i]) - first, int(layout.column[i]), int(layout.length[i])
        place, before = (place + 1 if row == before else 0), row
        document = layout.document[i]
        source = int(offsets[document] + layout.start[i])
        record, end = records[row], column + 1 + length
        record["tokens"][column] = bos
        record["tokens"][column + 1 : end] = tokens[source : source + length]
        if layout.last[i]:
            record["tokens"][end] = eos
            end += 1
        record["segment_ids"][column:end] = place + 1
        record["document_ids"][place] = document_ids[document]
    ids = records["segment_ids"]
    records["loss_mask"][:, 1:] = (ids[:, 1:] != 0) & (ids[:, 1:] == ids[:, :-1])
    return records
