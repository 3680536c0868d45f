"""From rows of the selection log to texts that people can read, each with where it came from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds

from opus_jax.data.records import DOCUMENTS_FILE, Manifest, RowReader
from opus_jax.data.tokenizer import Tokenizer, load_tokenizer
from opus_jax.errors import UserError
from opus_jax.reports.run import Run
from opus_jax.reports.selection_reader import Extreme
from opus_jax.training.run_folder import RECORDS


@dataclass(frozen=True)
class Segment:
    """The part of one document that lies in a row."""

    text: str
    source: str
    licence: str
    noise: str | None


@dataclass(frozen=True)
class Example:
    """One scored candidate and its text."""

    found: Extreme
    segments: tuple[Segment, ...]


def records_folder(run: Run) -> Path:
    """The prepared corpus that the run was trained on.

    Raises:
      UserError: it is not on this machine, or its place now holds another corpus.
    """
    file = run.folder / RECORDS
    try:
        named = json.loads(file.read_text())
        folder, fingerprint = Path(named["folder"]), named["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run.folder} does not say which prepared corpus it read ({RECORDS} is absent)") from None
    manifest = Manifest.load(folder)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{folder} now holds another corpus ({manifest.fingerprint}; the run read {fingerprint})")
    return folder


def read_examples(records: Path, found: Sequence[Extreme]) -> list[Example]:
    """The texts of candidates, decoded from the very tokens that the model read.

    Raises:
      UserError: the records are damaged.
      IndexError: a candidate is not a row of the training split.
    """
    if not found:
        return []
    tokenizer = load_tokenizer(records)
    rows = RowReader(records, "train").read([extreme.example_id for extreme in found])
    documents = _documents(records, np.unique(rows["document_ids"][rows["document_ids"] >= 0]))
    return [Example(extreme, _segments(row, tokenizer, documents)) for extreme, row in zip(found, rows, strict=True)]


def _segments(row: np.void, tokenizer: Tokenizer, documents: dict[int, dict[str, Any]]) -> tuple[Segment, ...]:
    segments = []
    for place in range(int(row["segment_ids"].max())):
        document = documents[int(row["document_ids"][place])]
        text = tokenizer.decode(row["tokens"][row["segment_ids"] == place + 1])
        segments.append(Segment(text, document["source"], document["licence"], document["noise"]))
    return tuple(segments)


def _documents(records: Path, ids: np.ndarray) -> dict[int, dict[str, Any]]:
    """Source, licence and noise of some documents; the texts of the others are never read."""
    names = ["document_id", "source", "licence", "noise"]
    table = ds.dataset(str(records / DOCUMENTS_FILE), format="parquet")
    wanted = table.to_table(columns=names, filter=pc.field("document_id").isin(ids.tolist()))
    return {row["document_id"]: row for row in wanted.to_pylist()}
