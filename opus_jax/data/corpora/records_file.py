"""Read one file of the user's: text, JSON lines (plain, .gz, .zst) or Parquet. What cannot be read is reported."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

from opus_jax.data.corpora.pieces import PIECE_CHARACTERS, pieces
from opus_jax.data.corpora.zstd_lines import zstd_lines
from opus_jax.errors import UserError

TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".org", ".py")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst")
READABLE = f"{', '.join(TEXT + JSON_LINES)} (also {' and '.join(COMPRESSED)}) and {', '.join(PARQUET)}"

_LARGEST_TEXT_FILE = 4 * PIECE_CHARACTERS  # a longer one is cut, or a book would lie in a single split
_ROWS_AT_ONCE = 512

Report = Callable[[str, int | None], None]  # reason, line or row (from 1)
Record = tuple[dict[str, Any], int | None]


def is_readable(file: Path) -> bool:
    kind = _kind(file)
    return kind in TEXT + JSON_LINES or (kind in PARQUET and file.suffix.lower() in PARQUET)


def read_records(file: Path, fields: tuple[str, ...], report: Report) -> Iterator[Record]:
    """Records of a file with the line (or row) of each; a text file gives records {fields[0]: text}.

    Args:
      fields: the fields that are needed, the text first.
      report: called for everything that is left out.

    Raises:
      UserError: a Parquet file lacks a column.
    """
    kind = _kind(file)
    try:
        if kind in PARQUET:
            yield from _parquet_rows(file, fields)
        elif kind in JSON_LINES:
            yield from _json_lines(file, report)
        else:
            yield from _text_pieces(file, fields[0], report)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        report(f"unreadable from here on ({type(error).__name__})", None)


def check_text(value: Any, field: str) -> str | None:
    """What is wrong with the value of a text field, or None."""
    if value is None:
        return f"no field {field!r}"
    if not isinstance(value, str):
        return f"field {field!r} is not text"
    if not value.strip():
        return f"field {field!r} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"field {field!r} holds half a surrogate pair"
    return None


def _kind(file: Path) -> str:
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return inner.suffix.lower()


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as raw:
        if file.suffix.lower() == ".gz":
            yield from gzip.GzipFile(fileobj=raw)
        elif file.suffix.lower() == ".zst":
            yield from zstd_lines(raw)
        else:
            yield from raw


def _text_pieces(file: Path, field: str, report: Report) -> Iterator[Record]:
    kept = []
    for number, line in enumerate(_lines(file), 1):
        try:
            kept.append(line.decode())
        except UnicodeDecodeError:
            report("not UTF-8", number)
    text = "".join(kept).removeprefix("\ufeff").replace("\r\n", "\n")
    whole = len(text) <= _LARGEST_TEXT_FILE
    yield from (({field: part}, None) for part in ([text] if whole else pieces(text)))


def _json_lines(file: Path, report: Report) -> Iterator[Record]:
    for number, line in enumerate(_lines(file), 1):
        try:
            record = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        except UnicodeDecodeError:
            report("not UTF-8", number)
        except (ValueError, RecursionError):
            report("not JSON", number)
        else:
            if isinstance(record, dict):
                yield record, number
            elif line.strip():
                report("not a JSON object", number)


def _parquet_rows(file: Path, fields: tuple[str, ...]) -> Iterator[Record]:
    table = pyarrow.parquet.ParquetFile(file)
    for field in fields:
        if field not in table.schema_arrow.names:
            raise UserError(f"{file} has no column {field!r}; it has {', '.join(table.schema_arrow.names)}")
    number = 0
    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=list(fields)):
        for record in batch.to_pylist():
            number += 1
            yield record, number
