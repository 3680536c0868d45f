"""A process that hangs ends by itself, with its stacks; one that works does not, whatever its clock says."""

import subprocess
import sys
import time

import pytest

from opus_jax.training.watchdog import COMPILING, Watchdog

HANGS = """
import sys, threading
from opus_jax.training.watchdog import Watchdog

def waits_for_a_partner_that_never_comes():
    threading.Event().wait()

with Watchdog(float(sys.argv[1]), "go on so and so") as watchdog:
    watchdog.alive("step 7")
    waits_for_a_partner_that_never_comes()
"""


def test_a_hang_ends_the_process_with_its_stacks() -> None:
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", HANGS, "0.3"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "waits_for_a_partner_that_never_comes" in ended.stderr
    assert ended.stderr.strip().endswith(
        "opus-jax: step 7 has taken more than 0.3 seconds (run.watchdog_seconds): the process ends here, its threads "
        "are above; go on so and so"
    )
    assert time.monotonic() - started < 30


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a watchdog would have ended."""
    seen: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, doing, limit: seen.append(doing))
    return seen


def test_signs_of_life_and_compilations_are_let_pass(ended: list[str]) -> None:
    with Watchdog(0.4, "") as watchdog:
        for step in range(8):
            watchdog.alive(f"step {step}")
            time.sleep(0.1)
        watchdog.alive("compiling", compiles=True)
        time.sleep(0.4 * COMPILING / 2)
    assert ended == []


def test_no_clock_that_can_be_set_is_asked(ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Watchdog(30.0, "") as watchdog:
        monkeypatch.setattr(time, "time", lambda: 1e12)
        watchdog.alive("step 1")
        time.sleep(1.2)
    assert ended == []


def test_off_means_off(ended: list[str]) -> None:
    with Watchdog(None, "") as watchdog:
        watchdog.alive("step 1")
        time.sleep(0.2)
    assert ended == []
