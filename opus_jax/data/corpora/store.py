"""Documents kept on disk after parsing or downloading: one compressed file of JSON lines for each domain."""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from opus_jax.data.documents import Document
from opus_jax.errors import UserError


@functools.cache
def reader_version() -> str:
    """A hash of the source of everything that turns files into documents: stored documents of another one are stale."""
    folder = Path(__file__).parent
    sources = [path.read_bytes() for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def save(documents: Iterable[Document], file: Path) -> None:
    """Write documents to `file`, which exists only once all are written. The format carries a checksum."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as raw, zstandard.ZstdCompressor(3, write_checksum=True).stream_writer(raw) as out:
            for document in documents:
                out.write(json.dumps([document.text, document.source]).encode() + b"\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read(file: Path) -> Iterator[Document]:
    """The documents of `file`, in the order in which they were saved.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for line in io.TextIOWrapper(stream, "utf-8", newline="\n"):
                yield Document(*json.loads(line))
    except (zstandard.ZstdError, ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete it, and the next run makes it again") from None
