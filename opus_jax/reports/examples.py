"""From rows of the selection log, and documents of a plan, to texts that people can read, each with its origin."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds

from opus_jax.data.records import DOCUMENTS_FILE, RowReader
from opus_jax.data.tokenizer import Tokenizer, load_tokenizer
from opus_jax.reports.decisions import StoppedDocument
from opus_jax.reports.selection_reader import Extreme


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


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document that the stream offers less than at first."""

    stopped: StoppedDocument
    segment: Segment


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


def read_excerpts(records: Path, found: Sequence[StoppedDocument], characters: int = 600) -> list[Excerpt]:
    """The first `characters` of documents, in the order asked for; those that the corpus lacks are left out."""
    documents = _documents(records, np.array([stopped.document_id for stopped in found], np.int64), "text")
    return [
        Excerpt(stopped, Segment(_beginning(line["text"], characters), line["source"], line["licence"], line["noise"]))
        for stopped in found
        if (line := documents.get(stopped.document_id)) is not None
    ]


def _beginning(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} …"


def _segments(row: np.void, tokenizer: Tokenizer, documents: dict[int, dict[str, Any]]) -> tuple[Segment, ...]:
    segments = []
    for place in range(int(row["segment_ids"].max())):
        document = documents[int(row["document_ids"][place])]
        text = tokenizer.decode(row["tokens"][row["segment_ids"] == place + 1])
        segments.append(Segment(text, document["source"], document["licence"], document["noise"]))
    return tuple(segments)


def _documents(records: Path, ids: np.ndarray, *more: str) -> dict[int, dict[str, Any]]:
    """Source, licence and noise of some documents, and more columns; those of the others are never kept."""
    names = ["document_id", "source", "licence", "noise", *more]
    table = ds.dataset(str(records / DOCUMENTS_FILE), format="parquet")
    wanted = table.to_table(columns=names, filter=pc.field("document_id").isin(ids.tolist()))
    return {row["document_id"]: row for row in wanted.to_pylist()}
