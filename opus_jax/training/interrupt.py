"""Stopping a run cleanly: Ctrl-C and SIGTERM ask the loop to save and leave."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """The first signal that has asked this process to stop: SIGINT, SIGTERM, or None so far."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_signals(*, sigterm: bool = True) -> Iterator[StopRequest]:
    """What Ctrl-C or SIGTERM asks for; a second Ctrl-C stops at once, without saving.

    Outside the main thread (a notebook's worker, say) signals cannot be caught and nothing is ever asked.

    Args:
      sigterm: False leaves SIGTERM to whoever catches it already (JAX's preemption service).
    """
    asked = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = asked.signal or signal.Signals(number)

    caught = (signal.SIGINT, signal.SIGTERM) if sigterm else (signal.SIGINT,)
    before = {number: signal.signal(number, ask) for number in caught}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
