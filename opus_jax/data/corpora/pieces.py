"""Cut a long text into documents of readable size at its own boundaries."""

import math
import re
from collections.abc import Iterator

PIECE_CHARACTERS = 16_000


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Parts of `text`, in order, of about equal length and of about `size` characters at most.

    A part ends at a paragraph (an empty line); a paragraph longer than `size` is cut at a line end, and a line longer
    than that at `size` itself. Empty lines around a part are dropped, nothing else is.
    """
    target = len(text) / max(1, math.ceil(len(text) / size))
    part: list[str] = []
    length = 0
    for paragraph in _bounded(text, size):
        if part and length + len(paragraph) / 2 > target:
            yield from _stripped(part)
            part, length = [], 0
        part.append(paragraph)
        length += len(paragraph)
    yield from _stripped(part)


def _bounded(text: str, size: int) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n)(?=\s*\n)", text):
        if len(paragraph) <= size:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            yield from (line[start : start + size] for start in range(0, len(line), size))


def _stripped(part: list[str]) -> Iterator[str]:
    text = "".join(part).strip("\n").rstrip()
    if text.strip():
        yield text
