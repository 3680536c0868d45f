"""Lines of a Zstandard file, with an error where the file ends too early."""

from collections.abc import Iterator
from typing import BinaryIO

import zstandard

_CHUNK = 1 << 18


def zstd_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines, each with its newline but perhaps the last, of one or more frames.

    zstandard's own stream reader takes a truncated file for a complete one.

    Raises:
      EOFError: the last frame is cut short.
      zstandard.ZstdError: the data are not Zstandard, or a checksum is wrong.
    """
    rest = b""
    frame = None
    while chunk := raw.read(_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is cut short")
    if rest:
        yield rest
