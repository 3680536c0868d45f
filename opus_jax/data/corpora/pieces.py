"""Cut a long text into documents of readable size at its own boundaries."""

import math
import re
from collections.abc import Iterator

PIECE_CHARACTERS = 16_000


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Parts of `text`, in order, of about equal length and of about `size` characters at most.

    A part ends at a paragraph (an empty line); a paragraph longer than `size` is cut at a line end, and a line longer
    than that at `size` itself. Empty lines around a part and white space at its end are
    dropped, nothing else is.
    """
    target = len(text) / max(1, math.ceil(len(text) / size))
    parts: list[str] = [""]
    for paragraph in _bounded(text, size):
        if parts[-1] and len(parts[-1]) + len(paragraph) / 2 > target:
            parts.append("")
        parts[-1] += paragraph
    if len(parts) > 1 and len(parts[-1]) < target / 4:
        parts[-2:] = [parts[-2] + parts[-1]]
    stripped = (part.strip("\n").rstrip() for part in parts)
    return (part for part in stripped if part)


def _bounded(text: str, size: int) -> Iterator[str]:
    for paragraph in re.split(r"(?<=\n)(?=[ \t]*\n)", text):
        if len(paragraph) <= size:
            yield paragraph
            continue
        for line in paragraph.splitlines(keepends=True):
            yield from (line[start : start + size] for start in range(0, len(line), size))
