"""What a signal asks for, and what one process alone makes of it."""

import os
import signal
import threading

import pytest

from opus_jax.cli import DONE, EXIT_CODES, INTERRUPTED
from opus_jax.errors import InterruptedRunError, PreemptedRunError
from opus_jax.training.interrupt import StopRequest, stop_signals
from opus_jax.training.preemption import Stopping, service_is_on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as asked:
        stopping = Stopping(asked)
        assert stopping.after(1) is None
        os.kill(os.getpid(), number)
        assert stopping.after(2) == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.after(2) == number, "the first one counts"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_is_left_to_the_service_where_it_is_on() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        with stop_signals(sigterm=False) as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.signal is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert noted == [signal.SIGTERM]
    assert not service_is_on(), "one process catches its own signals"


def test_outside_the_main_thread_nothing_is_caught() -> None:
    seen: list[StopRequest] = []

    def run() -> None:
        with stop_signals() as asked:
            seen.append(asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen[0].signal is None


def test_preempted_is_no_failure_and_interrupted_is_by_hand() -> None:
    def code(error: Exception) -> int:
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))

    assert code(PreemptedRunError("")) == DONE
    assert code(InterruptedRunError("")) == INTERRUPTED
