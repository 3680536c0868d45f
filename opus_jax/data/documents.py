"""What a corpus is: named domains, each with a licence note and documents that can be read again and again."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from opus_jax.errors import ConfigError

_EXAMPLES_KEPT = 20


@dataclass(frozen=True)
class Document:
    """One text. `source` says where it came from; `noise` names the transform that corrupted it, if one did."""

    text: str
    source: str
    noise: str | None = None


@dataclass(frozen=True)
class Domain:
    """A kind of text. `documents()` starts a fresh reading, always in the same order."""

    name: str
    licence: str
    documents: Callable[[], Iterator[Document]]


@dataclass
class Problems:
    """What could not be read: counts by file and reason, and the first few places.

    Readers call `begin(file)` before each reading of a file, so that reading twice does not count twice.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    places: list[tuple[str, str]] = field(default_factory=list)

    def begin(self, file: str) -> None:
        for key in [key for key in self.counts if key[0] == file]:
            del self.counts[key]
        self.places[:] = [place for place in self.places if place[0] != file]

    def add(self, file: str, reason: str, place: str | int | None = None) -> None:
        self.counts[(file, reason)] += 1
        if len(self.places) < _EXAMPLES_KEPT:
            self.places.append((file, f"{file}:{place}: {reason}" if place is not None else f"{file}: {reason}"))

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_mapping(self) -> dict:
        """Plain values for a manifest: {"total", "counts": {"file: reason": n}, "places": ["file:line: reason"]}."""
        return {
            "total": self.total,
            "counts": {f"{file}: {reason}": n for (file, reason), n in sorted(self.counts.items())},
            "places": [text for _, text in self.places],
        }


@dataclass(frozen=True)
class Corpus:
    """A named set of domains.

    Attributes:
      versions: what exactly was read (packages, files and their hashes). Equal versions and an equal CorpusConfig
        mean equal documents, so a cache may be keyed by both.
      problems: filled while documents are read; complete once every domain has been read.
    """

    name: str
    domains: tuple[Domain, ...]
    versions: dict[str, str]
    problems: Problems = field(default_factory=Problems)


def require_known(key: str, wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ConfigError that names the nearest domain when `wanted` holds one that does not exist."""
    names = list(known)
    for name in wanted:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]!r}; " if nearest else ""
            listed = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
            raise ConfigError(key, name, f"no such domain; {hint}the corpus has {listed or 'none'}")
