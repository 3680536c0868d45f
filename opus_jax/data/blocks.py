"""Group a stream of texts into blocks that are worth working on at once."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

CHARACTERS = 1 << 20  # enough to make array operations worth it


def blocks(items: Iterable[Item], size: Callable[[Item], int], limit: int = CHARACTERS) -> Iterator[list[Item]]:
    """Lists of consecutive items, each closed by the item with which its sizes add up to `limit` or more."""
    block: list[Item] = []
    characters = 0
    for item in items:
        block.append(item)
        characters += size(item)
        if characters >= limit:
            yield block
            block, characters = [], 0
    if block:
        yield block
