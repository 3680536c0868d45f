"""Where the wall time of a run goes: a stopwatch that always runs, on one category at a time.

The seconds of all attempts are in the checkpoint. When a run is resumed, the time since that checkpoint counts as
`restart`: the steps that were lost with it, and the time in which nothing ran.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import jax

from opus_jax.training.totals import Totals

Item = TypeVar("Item")

CATEGORIES = {
    "compile": "tracing and compiling, or fetching compiled programs, wherever that happens",
    "data_wait": "the host waits for rows; the devices may be working meanwhile",
    "step": "steps, logs of steps included",
    "save": "the loop waits for checkpoints and uploads",
    "evaluate": "evaluations",
    "restart": "from the checkpoint that a later attempt began with to the start of that attempt",
    "other": "preparing the corpus, building and restoring, summary",
}
_COMPILING = "/jax/core/compile/"


class Goodput:
    """Runs from its making. A context manager: inside it, compiling is told apart from what asked for it.

    Everything is of the thread that made it; what other threads do in the background is not waited for and not counted.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._current, self._since = "other", time.perf_counter()
        self._began, self._attempts = time.time(), 1
        self._thread = threading.get_ident()
        self._compiling: list[tuple[float, float]] = []

    def __enter__(self) -> "Goodput":
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def go_on(self, totals: Totals) -> None:
        """Add the attempts before this one; `totals` are those of the checkpoint, or fresh."""
        if not totals.goodput:
            return
        for category, seconds in totals.goodput.items():
            self._seconds[category] += seconds
        # two machines' clocks, or one that was set: time never runs backwards here
        self._seconds["restart"] += max(0.0, self._began - totals.stamped)
        self._attempts += totals.attempts

    @contextmanager
    def spent(self, category: str) -> Iterator[None]:
        """What happens inside counts as `category`, but for what it contains of other categories."""
        before = self._current
        self._switch(category)
        try:
            yield
        finally:
            self._switch(before)

    def waiting(self, stream: Iterator[Item]) -> Iterator[Item]:
        """The items of a stream; the time until each is there counts as `data_wait`."""
        while True:
            with self.spent("data_wait"):
                try:
                    item = next(stream)
                except StopIteration:
                    return
            yield item

    def stamp(self, totals: Totals) -> None:
        """Bring the goodput of `totals` up to now."""
        self._switch(self._current)
        totals.goodput, totals.attempts, totals.stamped = dict(self._seconds), self._attempts, time.time()

    def _switch(self, category: str) -> None:
        now = time.perf_counter()
        elapsed = now - self._since
        compiling = min(sum(end - start for start, end in self._compiling), elapsed)
        self._seconds["compile"] += compiling
        self._seconds[self._current] += elapsed - compiling
        self._current, self._since, self._compiling = category, now, []

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        """JAX says so when a part of compiling has ended; parts nest, and are counted once."""
        if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
            return
        end = time.perf_counter()
        start = max(end - duration_secs, self._since)
        while self._compiling and self._compiling[-1][0] >= start:
            self._compiling.pop()
        if self._compiling:
            start = max(start, self._compiling[-1][1])
        if start < end:
            self._compiling.append((start, end))


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each category's share of all; they sum to 1, or are all 0 where no time was counted."""
    total = sum(seconds.values())
    return {category: value / total if total else 0.0 for category, value in seconds.items()}


def in_words(seconds: Mapping[str, float]) -> str:
    """One line: the shares of at least half a per cent, the largest first."""
    largest = sorted(shares(seconds).items(), key=lambda item: -item[1])
    return "time: " + ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in largest if share >= 0.005)
