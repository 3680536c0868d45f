import itertools
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from small_runs import lines, small_config

from opus_jax.training import goodput
from opus_jax.training.goodput import CATEGORIES, Goodput, in_words, shares
from opus_jax.training.loop import train
from opus_jax.training.totals import Totals

COMPILED = "/jax/core/compile/backend_compile_duration"


class Clock(SimpleNamespace):
    """Stands in for the module time."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 + self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(goodput, "time", made)
    return made


def stamped(watch: Goodput) -> dict[str, float]:
    totals = Totals()
    watch.stamp(totals)
    return {name: seconds for name, seconds in totals.goodput.items() if seconds}


def test_every_second_is_of_one_category(clock: Clock) -> None:
    watch = Goodput()
    clock.pass_(1)
    with watch.spent("step"):
        clock.pass_(2)
        with watch.spent("save"):
            clock.pass_(4)
        clock.pass_(8)
    clock.pass_(16)
    assert stamped(watch) == {"other": 17, "step": 10, "save": 4}
    assert sum(shares(stamped(watch)).values()) == pytest.approx(1)


def test_compiling_is_taken_from_what_asked_for_it_and_counted_once(clock: Clock) -> None:
    with Goodput() as watch, watch.spent("step"):
        clock.pass_(10)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 1.0)  # from 9 to 10
        clock.pass_(5)
        jax.monitoring.record_event_duration_secs(COMPILED, 9.0)  # from 6 to 15, the one before inside it
        jax.monitoring.record_event_duration_secs("/jax/other", 3.0)
        other = threading.Thread(target=jax.monitoring.record_event_duration_secs, args=(COMPILED, 4.0))
        other.start()
        other.join()
        clock.pass_(1)
        assert stamped(watch) == {"compile": 9, "step": 7}
    jax.monitoring.record_event_duration_secs(COMPILED, 100.0)
    assert stamped(watch) == {"compile": 9, "step": 7}, "nothing is heard after the end"


def test_waiting_for_a_stream_is_data_wait(clock: Clock) -> None:
    def slow() -> Any:
        for i in range(3):
            clock.pass_(1)
            yield i

    watch, seen = Goodput(), []
    with watch.spent("step"):
        for item in watch.waiting(slow()):
            clock.pass_(10)
            seen.append(item)
    assert seen == [0, 1, 2]
    assert stamped(watch) == {"data_wait": 3, "step": 30}


@pytest.mark.parametrize(("gap", "restart"), [(7.0, 7.0), (-50.0, 0.0)])
def test_later_attempts_add_to_earlier_ones(clock: Clock, gap: float, restart: float) -> None:
    first, totals = Goodput(), Totals()
    clock.pass_(3)
    first.stamp(totals)
    clock.pass_(gap)  # a clock that was set back gives no negative time
    second = Goodput()
    second.go_on(Totals.from_mapping(totals.to_mapping()))
    with second.spent("evaluate"):
        clock.pass_(5)
    second.stamp(totals)
    assert totals.attempts == 2
    assert {name: s for name, s in totals.goodput.items() if s} == pytest.approx(
        {"other": 3.0, "evaluate": 5.0} | ({"restart": restart} if restart else {})
    )


def test_the_shares_in_words() -> None:
    assert in_words({"step": 60.0, "data_wait": 39.9, "save": 0.1}) == "time: step 60%, data wait 40%"
    assert in_words(dict.fromkeys(CATEGORIES, 0.0)) == "time: "


def test_a_run_says_where_its_time_went_also_when_it_is_resumed(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, "selection.method=random", "run.steps=4", "run.eval_every=2", "run.save_every=2"
    )  # fmt: skip
    first = train(config, progress=False)
    assert list(first["goodput"]) == list(CATEGORIES)
    assert sum(first["goodput"].values()) == pytest.approx(1)
    assert all(first["goodput_seconds"][name] > 0 for name in ("compile", "step", "save", "evaluate", "other"))
    assert first["goodput_seconds"]["restart"] == 0
    logged = [line["goodput_seconds"] for line in lines(str(config.run.dir))]
    assert all(a[name] <= b[name] for a, b in itertools.pairwise(logged) for name in CATEGORIES)

    (tmp_path / "run" / "summary.json").unlink()
    again = train(config, progress=False)
    assert again["attempts"] == 2
    assert sum(again["goodput"].values()) == pytest.approx(1)
    assert again["goodput_seconds"]["restart"] > 0
    assert again["goodput_seconds"]["step"] >= logged[-1]["step"]
