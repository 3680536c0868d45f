"""SWORD modules: scriptures and commentaries in compressed blocks of OSIS markup.

A module has, for each testament, `?t.?zs` (blocks: offset, compressed size, size, as little-endian 32-bit numbers),
`?t.?zz` (the zlib blocks) and `?t.?zv` (verses: block, offset, size; the size has 16 bits, or 32 in version 4).
"""

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from opus_jax.data.corpora.parsers.plain import documents, files
from opus_jax.data.documents import Document

_CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"')
_NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
_PARAGRAPH = re.compile(r'<(?:div [^>]*sID=[^>]*type="x-p"|/?title\b|/?p\b|lg\b)[^>]*>')
_LINE = re.compile(r"<(?:lb\b|/row\b|/l\b|l [^>]*eID)[^>]*>")
_TAG = re.compile(r"<[^>]*>")


def sword_modules(root: Path, package: str) -> Iterator[Document]:
    """One document for each chapter of each module in a package (several where a chapter is long)."""
    for index in files(root, "usr/share/sword/modules/**/*.[bc]zs"):
        chapter = index.stem
        parts: list[str] = []
        for entry in _entries(index):
            heading = _CHAPTER.search(entry)
            if heading:
                yield from documents("".join(parts), f"{package}: {chapter}")
                chapter, parts = heading.group(1), []
            parts.append(plain_text(entry))
        yield from documents("".join(parts), f"{package}: {chapter}")


def plain_text(osis: str) -> str:
    """OSIS markup to text: notes go, paragraphs, titles and lines of verse are kept, entities are decoded."""
    text = _PARAGRAPH.sub("\n\n", _LINE.sub("\n", _NOTE.sub(" ", osis)))
    text = html.unescape(_TAG.sub("", text))
    text = re.sub(r" *\n *", "\n", re.sub(r"[ \t]+", " ", text))
    return re.sub(r" (?=[,.;:!?])", "", re.sub(r"\n{3,}", "\n\n", text))


def _entries(index: Path) -> Iterator[str]:
    """The raw text of each verse; verses that share one text (as in commentaries) give it once."""
    packed = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
    verses = index.with_suffix(index.suffix[:-1] + "v").read_bytes()
    blocks = [zlib.decompress(packed[o : o + size]) for o, size, _ in struct.iter_unpack("<III", index.read_bytes())]
    layout = "<IIH" if _fits(verses, "<IIH", blocks) else "<III"
    before = None
    for block, offset, size in struct.iter_unpack(layout, verses):
        if size and (block, offset) != before:
            before = (block, offset)
            yield blocks[block][offset : offset + size].decode("utf-8", "replace")


def _fits(verses: bytes, layout: str, blocks: list[bytes]) -> bool:
    if len(verses) % struct.calcsize(layout):
        return False
    return all(
        size == 0 or (block < len(blocks) and offset + size <= len(blocks[block]))
        for block, offset, size in struct.iter_unpack(layout, verses)
    )
