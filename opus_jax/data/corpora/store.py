"""Documents kept on disk after parsing or downloading: one compressed file of JSON lines for each domain."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from opus_jax.data.corpora.zstd_lines import zstd_lines
from opus_jax.data.documents import Document, Problems
from opus_jax.errors import UserError

_MOST_DOMAINS = 500  # one open file each


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
        with _Writer(partial) as writer:
            for document in documents:
                writer.write(document)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def read(file: Path) -> Iterator[Document]:
    """The documents of `file`, in the order in which they were saved.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with file.open("rb") as raw:
            for line in zstd_lines(raw):
                yield Document(*json.loads(line))
    except (OSError, EOFError, zstandard.ZstdError, ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete its folder, and the next run makes it again") from None


def is_partitioned(folder: Path) -> bool:
    return (folder / "index.json").is_file()


def partition(documents: Iterable[tuple[str, Document]], folder: Path, problems: Problems) -> None:
    """Sort (domain, document) pairs into one file for each domain, and note `problems`; all or nothing.

    Raises:
      UserError: more domains than anyone would mean.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    writers: dict[str, _Writer] = {}
    try:
        for domain, document in documents:
            if domain not in writers:
                if len(writers) == _MOST_DOMAINS:
                    raise UserError(f"more than {_MOST_DOMAINS} domains: corpus.domain_field must name a coarser field")
                writers[domain] = _Writer(partial / f"{len(writers)}.jsonl.zst")
            writers[domain].write(document)
        for writer in writers.values():
            writer.close()
        index = {
            "domains": list(writers),
            "counts": [[*k, n] for k, n in problems.counts.items()],
            "places": problems.places,
        }
        (partial / "index.json").write_text(json.dumps(index))
        if not is_partitioned(folder):  # another process may have made the same
            partial.replace(folder)
    finally:
        for writer in writers.values():
            writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def partitioned(folder: Path) -> tuple[dict[str, Path], Problems]:
    """Domain name -> file, sorted by name, and the problems met when the folder was made."""
    index = json.loads((folder / "index.json").read_text())
    problems = Problems(places=[tuple(place) for place in index["places"]])
    problems.counts.update({(file, reason): n for file, reason, n in index["counts"]})
    return {
        name: folder / f"{i}.jsonl.zst" for name, i in sorted((d, i) for i, d in enumerate(index["domains"]))
    }, problems


class _Writer:
    def __init__(self, file: Path):
        self._raw = file.open("wb")
        self._stream = zstandard.ZstdCompressor(3, write_checksum=True).stream_writer(self._raw)

    def write(self, document: Document) -> None:
        self._stream.write(json.dumps([document.text, document.source]).encode() + b"\n")

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
