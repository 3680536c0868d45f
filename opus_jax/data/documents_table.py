"""documents.parquet: every document of a prepared corpus, with its text, in the order of document ids."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from opus_jax.data.documents import Document
from opus_jax.data.records import DOCUMENTS_FILE
from opus_jax.errors import UserError

SCHEMA = pa.schema(
    [
        ("document_id", pa.int64()),
        ("domain_id", pa.int32()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("noise", pa.string()),
        ("bytes", pa.int64()),
        ("text", pa.string()),
    ]
)
_GROUP_BYTES = 8_000_000


def write_documents(placed: Iterable[tuple[str, int, Document]], licences: list[str], folder: Path) -> None:
    """Write (split, domain id, document) triples; document ids count from 0.

    Raises:
      UserError: a text is not valid Unicode (a lone surrogate, as JSON can spell).
    """
    with pq.ParquetWriter(folder / DOCUMENTS_FILE, SCHEMA, compression="zstd") as writer:
        group: list[dict] = []
        size = 0
        for document_id, (split, domain, document) in enumerate(placed):
            length = _utf8_length(document)
            fields = (
                document_id,
                domain,
                split,
                document.source,
                licences[domain],
                document.noise,
                length,
                document.text,
            )
            group.append(dict(zip(SCHEMA.names, fields, strict=True)))
            size += length
            if size >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                group, size = [], 0
        writer.write_table(pa.Table.from_pylist(group, SCHEMA))


def _utf8_length(document: Document) -> int:
    try:
        return len(document.text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{document.source} is not valid Unicode (a lone surrogate): repair or remove it") from None


def read_columns(folder: str | Path, *names: str) -> dict[str, list]:
    """Whole columns of the table, without the others (so without the texts unless asked for)."""
    return pq.read_table(Path(folder) / DOCUMENTS_FILE, columns=list(names)).to_pydict()


def iterate_texts(folder: str | Path, split: str | None = None) -> Iterator[str]:
    """The texts of all documents, or of one split's, in the order of document ids; a part at a time."""
    with pq.ParquetFile(Path(folder) / DOCUMENTS_FILE) as table:
        for batch in table.iter_batches(batch_size=256, columns=["split", "text"]):
            for name, text in zip(batch["split"].to_pylist(), batch["text"].to_pylist(), strict=True):
                if split is None or name == split:
                    yield text
