"""Text vectors in R's lazy-load databases.

`X.rdx` (a compressed serialisation) lists where each variable lies in `X.rdb`; there a variable is its size as a
big-endian 32-bit number, a byte for the compression (`2` bzip2, `Z` xz, none for zlib) and the compressed
serialisation. A serialisation in XDR is a header and nested items, each a 32-bit word of type and flags and then its
content ("R Internals", section 1.8).
"""

import bz2
import lzma
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_NIL, _PAIRS, _REFERENCE = 254, 2, 255
_SYMBOL, _TEXT, _LOGICALS, _INTEGERS, _REALS, _TEXTS, _LIST = 1, 9, 10, 13, 14, 16, 19


def text_vectors(rdb: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, elements) of the character vectors in a lazy-load database, sorted by name.

    Raises:
      ValueError: the database uses a feature of the format that data sets of text do not need.
    """
    index = _unserialize(_inflate(rdb.with_suffix(".rdx").read_bytes()))
    raw = rdb.read_bytes()
    for name, (offset, size) in sorted(index["variables"].items()):
        value = _unserialize(_inflate(raw[int(offset) + 4 : int(offset) + int(size)]))
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            yield name, value


def _inflate(packed: bytes) -> bytes:
    if packed[:1] == b"2":
        return bz2.decompress(packed[1:])
    if packed[:1] == b"Z":
        return lzma.decompress(packed[1:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return zlib.decompress(packed, 47)  # zlib or gzip, by its own header


def _unserialize(data: bytes) -> Any:
    if data[:2] != b"X\n":
        raise ValueError("an R serialisation that is not XDR")
    version = struct.unpack_from(">i", data, 2)[0]
    reader = _Reader(data, 14)
    if version >= 3:
        reader.bytes(reader.integer())  # the native encoding
    return reader.item()


class _Reader:
    def __init__(self, data: bytes, position: int):
        self.data, self.position = data, position
        self.references: list[Any] = []

    def bytes(self, size: int) -> bytes:
        self.position += size
        return self.data[self.position - size : self.position]

    def integer(self) -> int:
        return struct.unpack(">i", self.bytes(4))[0]

    def numbers(self, code: str, size: int) -> list:
        count = self.integer()
        return list(struct.unpack(f">{count}{code}", self.bytes(count * size)))

    def item(self) -> Any:
        word = self.integer()
        kind, attributes, tag = word & 255, word & 512, word & 1024
        if kind == _NIL:
            return None
        if kind == _PAIRS:
            return self._pairs(attributes, tag)
        if kind == _REFERENCE:
            return self.references[(word >> 8 or self.integer()) - 1]
        if kind == _SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == _TEXT:
            size = self.integer()
            return "" if size < 0 else self.bytes(size).decode("utf-8", "replace")
        value = self._vector(kind)
        names = (self.item() or {}).get("names") if attributes else None
        return dict(zip(names, value, strict=True)) if names else value

    def _pairs(self, attributes: int, tag: int) -> dict:
        if attributes:
            self.item()
        key = self.item() if tag else None
        value = self.item()
        return {key: value} | (self.item() or {})

    def _vector(self, kind: int) -> list:
        if kind in (_LOGICALS, _INTEGERS):
            return self.numbers("i", 4)
        if kind == _REALS:
            return self.numbers("d", 8)
        if kind in (_TEXTS, _LIST):
            return [self.item() for _ in range(self.integer())]
        raise ValueError(f"an R item of type {kind}")
