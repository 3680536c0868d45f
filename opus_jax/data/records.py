"""Reading a prepared corpus: the manifest, and rows by their index.

A records folder holds ArrayRecord shards `<split>-00000-of-00003.array_record` (one record per group, so any row is
read alone), `<split>.documents.npy` (the documents of every row), documents.parquet, the tokenizer, and manifest.json.
The manifest is written last.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opus_jax.data.packing import record_dtype
from opus_jax.data.shards import AGAIN, Shard
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

    def check_files(self, folder: str | Path, *, lenient: bool = False) -> None:
        """Raise UserError, naming the file, when one is missing or of another size; `lenient` lets shards pass."""
        shards = {shard for names in self.shards.values() for shard in names}
        for name, facts in self.files.items():
            file = Path(folder) / name
            size = file.stat().st_size if file.is_file() else None
            if size == facts["size"] or (lenient and name in shards):
                continue
            found = "missing" if size is None else f"{size} bytes long"
            other = ", or train without its rows: corpus.lenient=true" if name in shards else ""
            raise UserError(f"{file} is {found}, the manifest says {facts['size']} bytes: {AGAIN}{other}")

    def check_contents(self, folder: str | Path) -> None:
        """As `check_files`, and compare every file's SHA-256; reads the whole corpus."""
        self.check_files(folder)
        for name, facts in self.files.items():
            if sha256(Path(folder) / name) != facts["sha256"]:
                raise UserError(f"{Path(folder) / name} differs from its SHA-256 in the manifest: {AGAIN}")


def row_documents_file(split: str) -> str:
    return f"{split}.documents.npy"


def sha256(file: str | Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class RowReader:
    """Rows of one split, by index; row i has example_id i, and the rows of a domain are contiguous.

    Safe to use from several threads.

    Args:
      lenient: a row that cannot be read, be it for a damaged record or a missing shard, has its ids but no text: its
        segment_ids and loss_mask are zero.

    Raises:
      UserError: a file is missing, truncated, or does not hold the rows that the manifest states.
    """

    def __init__(self, folder: str | Path, split: str, *, lenient: bool = False):
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.load(folder)
        if split not in self.manifest.shards:
            raise UserError(f"split {split!r} of {folder}: there are {', '.join(self.manifest.shards)}")
        self.manifest.check_files(folder, lenient=lenient)
        self.dtype = record_dtype(self.manifest.row_tokens, self.manifest.segments_per_row)
        names = self.manifest.shards[split]
        rows = [self.manifest.files[name]["rows"] for name in names]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._shards = [
            Shard(self.folder / name, count, int(first), self.dtype, lenient=lenient)
            for name, count, first in zip(names, rows, self._starts, strict=False)
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The record of one row: the fields of `record_dtype`."""
        record = self.read([index])[0]
        return {name: record[name] for name in self.dtype.names or ()}

    @cached_property
    def domain_rows(self) -> list[range]:
        """The rows of each domain."""
        return [range(int(a), int(b)) for a, b in itertools.pairwise(self._domain_starts)]

    @cached_property
    def row_documents(self) -> np.ndarray:
        """int64[rows, S], mapped into memory: the document ids of every row's segments, -1 where there is none."""
        file = self.folder / row_documents_file(self.split)
        try:
            return np.load(file, mmap_mode="r" if len(self) else None, allow_pickle=False)
        except ValueError:  # NumPy's own words tell how to run what is in the file
            raise UserError(f"{file} is damaged, or is no array of numbers: {AGAIN}") from None

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Records of many rows, a structured array in the order asked for; one read for each shard they lie in.

        Raises:
          IndexError: an index is outside 0 to len - 1.
          UserError: a record is damaged; the message names shard and row.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"row {wanted.min()} or {wanted.max()} of {len(self)} rows")
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        records = np.empty(wanted.shape, self.dtype)
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            records[places] = self._shards[shard].read((wanted[places] - self._starts[shard]).tolist())
        unreadable = records["segment_ids"][:, 0] == 0  # any other row begins with a document
        if unreadable.any():
            for name, column in self.columns(wanted[unreadable]).items():
                records[name][unreadable] = column
        return records

    def columns(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """What a batch says of its rows beside their tokens, in the order asked for; no record is read.

        Returns:
          example_id int32[n], domain_id int32[n], document_ids int64[n, S].
        """
        wanted = np.asarray(indices, np.int64)
        return {
            "example_id": wanted.astype(np.int32),
            "domain_id": (np.searchsorted(self._domain_starts, wanted, side="right") - 1).astype(np.int32),
            "document_ids": np.array(self.row_documents[wanted]),
        }

    @cached_property
    def _domain_starts(self) -> np.ndarray:
        return self.manifest.domain_starts(self.split)


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
