"""Ends a process that hangs, with the stacks of all its threads, so that whoever started it can start it again.

A collective whose partner has stopped, a disk that answers no more: nothing raises, and the machines are paid for
until somebody looks. The clock is monotonic: a clock that is set forward ends nothing.
"""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

EXIT_CODE = 1
COMPILING = 4.0  # times as long for what compiles


class Watchdog:
    """A context manager; `alive` has to be called at least every `seconds` inside it.

    Args:
      seconds: the longest time between two signs of life; None = no watch.
      resume: what to say of going on, in one clause.
    """

    def __init__(self, seconds: float | None, resume: str):
        self._seconds, self._resume = seconds, resume
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self.alive("starting", compiles=True)

    def alive(self, doing: str, *, compiles: bool = False) -> None:
        """A sign of life.

        Args:
          doing: what begins now, for the message.
          compiles: it may take COMPILING times as long.
        """
        self._watched = (doing, (self._seconds or 0) * (COMPILING if compiles else 1), time.monotonic())

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self.alive("starting", compiles=True)
            self._thread = threading.Thread(target=self._watch, args=(self._seconds,), daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, seconds: float) -> None:
        while not self._left.wait(min(seconds / 10, 1.0)):
            doing, limit, since = self._watched
            if time.monotonic() - since > limit:
                self._end(doing, limit)

    def _end(self, doing: str, limit: float) -> None:
        """Nothing orderly is possible: the main thread is not to be had."""
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        line = (
            f"opus-jax: {doing} has taken more than {limit:g} seconds (run.watchdog_seconds): the process ends here, "
            f"its threads are above; {self._resume}"
        )
        os.write(2, (line + "\n").encode())
        os._exit(EXIT_CODE)
