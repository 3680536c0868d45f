"""From scored parts to one line per row and one per document."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Float64, Int64, Shaped

from opus_jax.data.documents_table import read_columns
from opus_jax.data.records import Manifest
from opus_jax.training.score_files import SCORES, part_files, write_file, write_table
from opus_jax.training.strict_json import encode

DOCUMENTS = "documents.parquet"

ROW_SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("domain", pa.string()),
        ("utility", pa.float32()),
        ("z", pa.float32()),
        ("target_tokens", pa.int32()),
        ("document_ids", pa.list_(pa.int64())),
    ]
)
DOCUMENT_SCHEMA = pa.schema(
    [
        ("document_id", pa.int64()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("utility", pa.float32()),
        ("tokens", pa.int64()),
        ("rows", pa.int32()),
        ("noise", pa.string()),
        ("standard_error", pa.float32()),
    ]
)


def finish(folder: Path, records: Path, split: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the rows and the documents from the parts, then scores.json, and return it."""
    manifest = Manifest.load(records)
    parts = part_files(folder)
    utilities, targets = (np.concatenate(columns) for columns in zip(*(_row_scores(p) for p in parts), strict=True))
    usable = np.isfinite(utilities) & (targets > 0)
    mean, sd = (float(f(utilities[usable])) if usable.any() else 0.0 for f in (np.mean, np.std))
    documents = _Documents(manifest.total_documents())
    first = 0
    for number, part in enumerate(parts):
        table = pq.read_table(part)
        rows = slice(first, first := first + table.num_rows)
        z = (utilities[rows] - mean) / (sd or 1.0)
        write_table(
            folder / f"rows-{number:06d}.parquet",
            _row_table(table, manifest.domains, utilities[rows], z, targets[rows]),
        )
        documents.add(_flat(table, "document_ids"), _flat(table, "sums"), _flat(table, "targets"))
    table = _document_table(documents, read_columns(records, *_NAMED), manifest.domains, split)
    write_table(folder / DOCUMENTS, table)
    found = {
        "rows": len(utilities),
        "documents": table.num_rows,
        "target_tokens": int(targets.sum()),
        "utility_mean": mean,
        "utility_sd": sd,
        "rows_not_finite": int((~np.isfinite(utilities)).sum()),
    }
    write_file(folder / SCORES, encode(facts | found, indent=1) + "\n")
    return facts | found


@dataclass
class _Documents:
    """Sums over the segments of every document, float64: utility u, target tokens t, and their squares."""

    count: int

    def __post_init__(self) -> None:
        self.u, self.t, self.uu, self.ut, self.tt = (np.zeros(self.count) for _ in range(5))
        self.segments = np.zeros(self.count, np.int64)

    def add(self, ids: Int64[np.ndarray, " P"], u: Float[np.ndarray, " P"], t: Shaped[np.ndarray, " P"]) -> None:
        u, t = u.astype(np.float64), t.astype(np.float64)
        np.add.at(self.segments, ids, 1)
        for total, values in ((self.u, u), (self.t, t), (self.uu, u * u), (self.ut, u * t), (self.tt, t * t)):
            np.add.at(total, ids, values)

    def utility(self) -> Float64[np.ndarray, " D"]:
        """Per target token."""
        return self.u / np.maximum(self.t, 1)

    def standard_error(self) -> Float64[np.ndarray, " D"]:
        """Of a ratio of sums over r segments: sqrt(r / (r - 1) sum (u_s - m t_s)^2) / t; NaN for a single one."""
        m, r = self.utility(), self.segments
        squares = np.maximum(self.uu - 2 * m * self.ut + m * m * self.tt, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(r > 1, np.sqrt(r / (r - 1) * squares) / np.maximum(self.t, 1), np.nan)


_NAMED = ("document_id", "domain_id", "split", "source", "noise")


def _document_table(documents: _Documents, named: dict[str, list], domains: list[str], split: str) -> pa.Table:
    ids = np.array([i for i, of in zip(named["document_id"], named["split"], strict=True) if of == split], np.int64)
    ids = ids[documents.segments[ids] > 0]
    error = documents.standard_error()[ids]
    columns = [
        ids,
        [named["source"][i] for i in ids],
        [domains[named["domain_id"][i]] for i in ids],
        documents.utility()[ids].astype(np.float32),
        documents.t[ids].astype(np.int64),
        documents.segments[ids].astype(np.int32),
        [named["noise"][i] for i in ids],
        pa.array(error.astype(np.float32), mask=np.isnan(error)),
    ]
    return pa.table(columns, schema=DOCUMENT_SCHEMA)


def _row_table(part: pa.Table, domains: list[str], utility: Any, z: Any, targets: Any) -> pa.Table:
    columns = [
        part["example_id"],
        np.array(domains, object)[part["domain_id"].to_numpy()],
        utility.astype(np.float32),
        z.astype(np.float32),
        targets.astype(np.int32),
        part["document_ids"],
    ]
    return pa.table(columns, schema=ROW_SCHEMA)


def _row_scores(part: Path) -> tuple[Float64[np.ndarray, " R"], Int64[np.ndarray, " R"]]:
    """(utility per target token, target tokens) of the rows of a part."""
    table = pq.read_table(part, columns=["sums", "targets"])
    lengths = table["sums"].combine_chunks().value_lengths().to_numpy()
    row, rows = np.repeat(np.arange(len(lengths)), lengths), len(lengths)
    sums = np.bincount(row, _flat(table, "sums").astype(np.float64), rows)
    targets = np.bincount(row, _flat(table, "targets"), rows).astype(np.int64)
    return sums / np.maximum(targets, 1), targets


def _flat(table: pa.Table, column: str) -> np.ndarray:
    return table[column].combine_chunks().flatten().to_numpy()
