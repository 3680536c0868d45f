"""Writing one split of a prepared corpus: documents shuffled within their domain, packed, in shards."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from opus_jax.data.packing import Layout, fill_rows, lay_out, record_dtype, segments_per_row
from opus_jax.data.permutation import permute
from opus_jax.data.records import SPLITS, row_documents_file
from opus_jax.data.tokenizer import Tokenizer

SHARD_BYTES = 256 << 20
_BLOCK_ROWS = 2048


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """All documents, by document id. `tokens` holds theirs end to end; `splits` holds places in SPLITS."""

    tokens: np.ndarray
    lengths: np.ndarray
    domains: np.ndarray
    splits: np.ndarray


@dataclass(frozen=True)
class WrittenSplit:
    """What was written: shard names with their rows, rows of each domain, and the share of places without a token."""

    shards: dict[str, int]
    domain_rows: list[int]
    padding: float


def write_split(
    folder: Path,
    split: str,
    documents: TokenizedDocuments,
    domain_count: int,
    tokenizer: Tokenizer,
    row_tokens: int,
    shard_bytes: int = SHARD_BYTES,
) -> WrittenSplit:
    """Write `<split>-*.array_record` and `<split>.documents.npy`; the rows of a domain are contiguous."""
    chosen = [_shuffled(documents, SPLITS.index(split), domain) for domain in range(domain_count)]
    layouts = [lay_out(documents.lengths[ids], row_tokens) for ids in chosen]
    rows = [layout.rows for layout in layouts]
    offsets = np.cumsum(documents.lengths) - documents.lengths
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)

    shards = _Shards(folder, split, sum(rows), record_dtype(row_tokens, segments_per_row(row_tokens)), shard_bytes)
    for domain, (ids, layout) in enumerate(zip(chosen, layouts, strict=True)):
        for first in range(0, layout.rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, layout.rows - first)
            block = fill_rows(layout, documents.tokens, offsets[ids], ids, row_tokens, first, count, special)
            shards.write(block, domain)
    shards.close()
    return WrittenSplit(shards.rows, rows, _padding(layouts, row_tokens))


def _shuffled(documents: TokenizedDocuments, split: int, domain: int) -> np.ndarray:
    ids = np.flatnonzero((documents.splits == split) & (documents.domains == domain))
    return ids[permute(np.arange(len(ids)), len(ids), split, domain)]


def _padding(layouts: list[Layout], row_tokens: int) -> float:
    places = sum(layout.rows for layout in layouts) * row_tokens
    return 1 - sum(layout.tokens for layout in layouts) / places if places else 0.0


class _Shards:
    """Cuts a stream of records into shards of whole rows, and notes the documents of every row beside them."""

    def __init__(self, folder: Path, split: str, total: int, dtype: np.dtype, shard_bytes: int):
        self._folder, self._limit = folder, max(1, shard_bytes // dtype.itemsize)
        count = -(-total // self._limit)
        self._names = [f"{split}-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
        self.rows = {name: min(self._limit, total - i * self._limit) for i, name in enumerate(self._names)}
        self._next = 0
        self._writer: ArrayRecordWriter | None = None
        # Written, not mapped into memory: a full disk is then an error instead of a killed process.
        self._row_documents = (folder / row_documents_file(split)).open("wb")
        header = {"descr": "<i8", "fortran_order": False, "shape": (total, *dtype["document_ids"].shape)}
        np.lib.format.write_array_header_1_0(self._row_documents, header)

    def write(self, records: np.ndarray, domain: int) -> None:
        records["example_id"] = np.arange(self._next, self._next + len(records))
        records["domain_id"] = domain
        self._row_documents.write(records["document_ids"].tobytes())
        for record in records:
            if self._next % self._limit == 0:
                self._open(self._names[self._next // self._limit])
            self._writer.write(record.tobytes())  # type: ignore[union-attr]
            self._next += 1

    def _open(self, name: str) -> None:
        if self._writer is not None:
            self._writer.close()
        # One record in a group: any row can be read alone.
        self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._row_documents.close()
