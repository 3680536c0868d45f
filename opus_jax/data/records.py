"""Reading a prepared corpus: the manifest, and rows by their index.

A records folder holds ArrayRecord shards `<split>-00000-of-00003.array_record` (one record per group, so any row is
read alone), `<split>.documents.npy` (the documents of every row), documents.parquet, the tokenizer, and manifest.json.
The manifest is written last.
"""

import hashlib
import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from opus_jax.data.packing import record_dtype
from opus_jax.errors import UserError

SPLITS = ("train", "validation", "proxy")
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
DOCUMENTS_FILE = "documents.parquet"

Counts = dict[str, dict[str, int]]  # split -> domain -> number


@dataclass(frozen=True)
class Manifest:
    """What a records folder holds. Counts are by split, then by domain.

    Attributes:
      domains: names; a record's domain_id is a place in this list.
      tokens: source tokens of the documents, without BOS and EOS. bytes: their UTF-8 bytes.
      padding: share of all places of rows that hold no token, by split.
      files: by file name, its rows (0 for other files), size in bytes and SHA-256.
      shards: names of a split's record files, in row order.
      details: what the corpus says of itself: source versions, problems met, documents removed as duplicates, noise.
    """

    name: str
    format_version: int
    fingerprint: str
    row_tokens: int
    segments_per_row: int
    vocab_size: int
    tokenizer_hash: str
    domains: list[str]
    licences: list[str]
    documents: Counts
    rows: Counts
    tokens: Counts
    bytes: Counts
    padding: dict[str, float]
    shards: dict[str, list[str]]
    files: dict[str, dict[str, Any]]
    details: dict[str, Any]

    @staticmethod
    def load(folder: str | Path) -> "Manifest":
        """Read and check manifest.json.

        Raises:
          UserError: it is absent, unreadable, of another format, or names a file outside its folder.
        """
        file = Path(folder) / MANIFEST_FILE
        try:
            manifest = Manifest(**json.loads(file.read_text()))
        except FileNotFoundError:
            raise UserError(
                f"no prepared corpus in {folder} ({MANIFEST_FILE} is absent): run opus-jax prepare"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): delete the folder and run opus-jax prepare again") from None
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{file} has record format {manifest.format_version}, this version reads {FORMAT_VERSION}: "
                "run opus-jax prepare again"
            )
        for name in [*manifest.files, *(shard for shards in manifest.shards.values() for shard in shards)]:
            if Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"{file} names {name!r}, which is not a plain file name: the manifest is not ours")
        return manifest

    def save(self, folder: str | Path) -> None:
        (Path(folder) / MANIFEST_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    def total_rows(self, split: str) -> int:
        return sum(self.rows[split].values())

    def total_documents(self) -> int:
        """Documents of all splits; document ids are 0 to this, less one."""
        return sum(sum(counts.values()) for counts in self.documents.values())

    def domain_starts(self, split: str) -> np.ndarray:
        """int64[G + 1]: the rows of domain g are starts[g] to starts[g + 1], less one."""
        return np.concatenate([[0], np.cumsum([self.rows[split][d] for d in self.domains])]).astype(np.int64)

    def check_files(self, folder: str | Path) -> None:
        """Raise UserError, naming the file, when one is missing or of another size."""
        for name, facts in self.files.items():
            file = Path(folder) / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["size"]:
                found = "missing" if size is None else f"{size} bytes long"
                raise UserError(f"{file} is {found}, the manifest says {facts['size']} bytes: {_AGAIN}")

    def check_contents(self, folder: str | Path) -> None:
        """As `check_files`, and compare every file's SHA-256; reads the whole corpus."""
        self.check_files(folder)
        for name, facts in self.files.items():
            if sha256(Path(folder) / name) != facts["sha256"]:
                raise UserError(f"{Path(folder) / name} differs from its SHA-256 in the manifest: {_AGAIN}")


_AGAIN = "delete the folder and run opus-jax prepare again"


def row_documents_file(split: str) -> str:
    return f"{split}.documents.npy"


def sha256(file: str | Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class RowReader:
    """Rows of one split, by index; row i has example_id i, and the rows of a domain are contiguous.

    Safe to use from several threads.

    Raises:
      UserError: a file is missing, truncated, or does not hold the rows that the manifest states.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.load(folder)
        if split not in self.manifest.shards:
            raise UserError(f"split {split!r} of {folder}: there are {', '.join(self.manifest.shards)}")
        self.manifest.check_files(folder)
        self.dtype = record_dtype(self.manifest.row_tokens, self.manifest.segments_per_row)
        self._shards = [self.folder / name for name in self.manifest.shards[split]]
        self._readers = [_open(shard, self.manifest.files[shard.name]["rows"]) for shard in self._shards]
        rows = [self.manifest.files[shard.name]["rows"] for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._locks = [threading.Lock() for _ in self._shards]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The record of one row: the fields of `record_dtype`."""
        record = self.read([index])[0]
        return {name: record[name] for name in self.dtype.names or ()}

    @cached_property
    def domain_rows(self) -> list[range]:
        """The rows of each domain."""
        starts = self.manifest.domain_starts(self.split)
        return [range(int(a), int(b)) for a, b in itertools.pairwise(starts)]

    @cached_property
    def row_documents(self) -> np.ndarray:
        """int64[rows, S], mapped into memory: the document ids of every row's segments, -1 where there is none."""
        return np.load(self.folder / row_documents_file(self.split), mmap_mode="r" if len(self) else None)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Records of many rows, a structured array in the order asked for; one read for each shard they lie in.

        Raises:
          IndexError: an index is outside 0 to len - 1.
          UserError: the shard is damaged.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"row {wanted.min()} or {wanted.max()} of {len(self)} rows")
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        records = np.empty(wanted.shape, self.dtype)
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            records[places] = self._read_shard(int(shard), (wanted[places] - self._starts[shard]).tolist())
        return records

    def _read_shard(self, shard: int, positions: list[int]) -> np.ndarray:
        try:
            with self._locks[shard]:
                raw = self._readers[shard].read(positions)
            return np.frombuffer(b"".join(raw), self.dtype)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self._shards[shard]} is damaged ({reason}): {_AGAIN}") from None


def batch_of(records: np.ndarray) -> dict[str, np.ndarray]:
    """A host batch from records: ids as int32, loss_mask as float32; document_ids stay for the host."""
    return {
        "tokens": np.ascontiguousarray(records["tokens"]),
        "segment_ids": np.ascontiguousarray(records["segment_ids"]),
        "loss_mask": records["loss_mask"].astype(np.float32),
        "example_id": records["example_id"].astype(np.int32),
        "domain_id": records["domain_id"].astype(np.int32),
        "document_ids": np.ascontiguousarray(records["document_ids"]),
    }


def _open(shard: Path, rows: int) -> ArrayRecordReader:
    try:
        reader = ArrayRecordReader(str(shard), "readahead_buffer_size:0")
        found = reader.num_records()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{shard} is damaged ({' '.join(str(error).split())[:200]}): {_AGAIN}") from None
    if found != rows:
        raise UserError(f"{shard} holds {found} rows, the manifest says {rows}: {_AGAIN}")
    return reader
