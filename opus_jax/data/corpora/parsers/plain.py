"""Files whose text needs no parsing, and the tidying that all parsers share."""

import gzip
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from opus_jax.data.corpora.pieces import PIECE_CHARACTERS, pieces
from opus_jax.data.documents import Document

_SHORTEST = 100  # characters; shorter documents are pointers and empty pages
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff")) | {0x00A0: " ", 0x000C: "\n"}


def files(root: Path, pattern: str) -> Iterator[Path]:
    """Regular files below `root` that match a glob, sorted. Links are not followed: packages link folders twice."""
    root = root.resolve()
    return (path for path in sorted(root.glob(pattern)) if path.is_file() and path.resolve() == path)


def short_name(path: Path) -> str:
    """The file's name with its folder, which is enough to find it in a package."""
    return "/".join(path.parts[-2:])


def text_of(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", "replace")


def documents(text: str, source: str, size: int = PIECE_CHARACTERS, shortest: int = _SHORTEST) -> Iterator[Document]:
    """Tidied `text` in documents of about `size` characters, numbered where there are several."""
    text = tidy(text)
    parts = list(pieces(text, size)) if len(text) >= shortest else []
    for number, part in enumerate(parts, 1):
        yield Document(part, f"{source} ({number} of {len(parts)})" if len(parts) > 1 else source)


def grouped(entries: Iterable[str], source: str, size: int = 6_000) -> Iterator[Document]:
    """Documents of consecutive short entries, about `size` characters each, named by their first entry."""
    group: list[str] = []
    length = 0
    for entry in itertools.chain(entries, [None]):
        if group and (entry is None or length >= size):
            first = re.split(r"[\n:;,\\]", group[0], maxsplit=1)[0].strip()
            yield from documents("\n\n".join(group), f"{source}: {first[:60]}", 2 * size, shortest=1)
            group, length = [], 0
        if entry is not None:
            group.append(tidy(entry))
            length += len(entry)


def tidy(text: str) -> str:
    """Unix line ends, no invisible characters, no white space at line ends, at most two empty lines in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_INVISIBLE)
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+(?=\n)", "", text)).strip("\n")


def plain_files(*patterns: str, without: str | None = None) -> Callable[[Path, str], Iterator[Document]]:
    """A parser of all files that match the globs, less those whose path matches the expression `without`."""

    def parse(root: Path, package: str) -> Iterator[Document]:
        for path in (path for pattern in patterns for path in files(root, pattern)):
            if without is None or not re.search(without, path.as_posix()):
                yield from documents(text_of(path), f"{package}: {short_name(path)}")

    return parse
