"""Plans and their lag: which scores decide which plan, and that a resumed run decides alike."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from small_runs import small_config

from opus_jax.config import FeedbackConfig
from opus_jax.data.buffers import Buffers, every_step
from opus_jax.data.plan import Plan, fitted
from opus_jax.errors import ConfigError, UserError
from opus_jax.selection.feedback import Proposal, start
from opus_jax.selection.groups import nested_groups
from opus_jax.training.decisions import describe
from opus_jax.training.steering import Steering

G = 3
ROWS = np.array([40, 30, 50])


@dataclass(frozen=True)
class Memory:
    """A controller that proposes what it was told: weights that name the windows it knows."""

    closed: tuple[float, ...] = ()
    open: tuple[float, ...] = ()
    windows: int = 0
    slots: list[int] = field(default_factory=list)

    def observe(self, scores, domain_ids, document_ids=None):
        return replace(self, open=(*self.open, *np.asarray(scores).tolist()))

    def close(self):
        return replace(self, closed=(*self.closed, *self.open), open=(), windows=self.windows + 1)

    def propose(self, slots):
        self.slots.append(slots)
        return self, Proposal(np.array([1.0, 1.0 + sum(self.closed), 1.0]), None)

    def to_arrays(self):
        return {"closed": np.array(self.closed), "open": np.array(self.open), "windows": np.asarray(self.windows)}

    def restored(self, arrays):
        return Memory(tuple(arrays["closed"].tolist()), tuple(arrays["open"].tolist()), int(arrays["windows"]))


def steering(window=4, steps=40, buffers=None, controller=None) -> Steering:
    plan = fitted(Plan(np.ones(G)), ROWS)
    return Steering(plan, buffers or every_step(8), steps, controller or Memory(), window)


def host(rows=8):
    return {"domain_id": np.arange(rows) % G, "document_ids": np.arange(rows)[:, None]}


def feed(steer: Steering, first: int, last: int) -> None:
    """Steps first .. last - 1; step t scores t, so that weights tell which steps were known."""
    for step in range(first, last):
        steer.record(step, np.array([float(step)]), host(1))


def test_the_plan_of_window_w_plus_1_knows_the_windows_up_to_w_minus_1():
    steer = steering(window=4)
    for step in range(24):
        plan, end = steer.plan_at(step)
        window = step // 4
        known = sum(range(4 * max(window - 1, 0)))
        assert plan.domain_weights[1] == 1 + known, f"step {step}"
        assert end == 4 * (window + 1)
        feed(steer, step, step + 1)
        assert steer.plan_at(step + 1)[0] is not None


def test_the_next_plan_is_there_a_window_before_it_is_needed():
    """So the host never waits: rows of window w + 1 could be read as soon as window w has begun."""
    steer = steering(window=4)
    feed(steer, 0, 4)
    assert steer.plan_at(8)[0].domain_weights[1] == 1 + sum(range(4))
    assert steer.plan_at(7)[0].domain_weights[1] == 1


def test_plans_carry_on_where_the_last_one_stopped():
    buffers = Buffers(candidates=8, batch=2, first=1, every=3)
    steer = steering(window=4, buffers=buffers)
    feed(steer, 0, 8)
    plan, _ = steer.plan_at(12)
    assert plan.first_slot == buffers.slots_before(12)
    assert plan.drawn.sum() == plan.first_slot
    assert steer.controller.slots[0] == buffers.slots_before(12) - buffers.slots_before(8)


@pytest.mark.parametrize("stop", [3, 4, 5, 8, 11, 13])
def test_a_resumed_run_decides_alike(stop):
    whole, first = steering(), steering()
    feed(whole, 0, 20)
    feed(first, 0, stop)
    again = steering()
    again.restore({name: np.asarray(value) for name, value in first.to_arrays().items()})
    for step in range(stop, stop + 4):
        assert np.array_equal(again.plan_at(step)[0].domain_weights, first.plan_at(step)[0].domain_weights)
    feed(again, stop, 20)
    for step in (20, 24):
        mine, theirs = again.plan_at(step)[0], whole.plan_at(step)[0]
        assert mine.first_slot == theirs.first_slot
        assert np.array_equal(mine.domain_weights, theirs.domain_weights)
        assert np.array_equal(mine.drawn, theirs.drawn)


def test_without_scores_or_a_controller_the_first_plan_holds():
    steer = steering(window=2)
    for step in range(8):
        steer.record(step, None, host())
    assert steer.plan_at(8)[0].domain_weights[1] == 1
    fixed = Steering(fitted(Plan(np.ones(G)), ROWS), every_step(8), 40)
    assert fixed.plan_at(30)[1] is None
    again = Steering(fitted(Plan(np.ones(G)), ROWS), every_step(8), 40)
    again.restore(fixed.to_arrays())
    assert again.plan_at(30)[0].domain_rows.tolist() == ROWS.tolist()


def test_decisions_are_written_and_those_of_an_undone_future_removed(tmp_path):
    documents = np.arange(ROWS.sum())[:, None]
    groups = nested_groups(
        ["domain", "cluster", "document"], ROWS, documents, 120, np.arange(120) % 2, ["one, two", "three"]
    )
    state = start(groups, settings=FeedbackConfig(floor=0.01, max_epochs=9.0))
    plan = fitted(Plan(np.ones(G)), ROWS)

    def fresh():
        return Steering(plan, every_step(8), 40, state, 4, documents)

    steer = fresh()
    steer.write_decisions(tmp_path, 0, describe(["a", "b", "c"]))
    for step in range(12):
        rows = np.arange(step, step + 24) * 5 % 120
        domains = np.searchsorted(np.cumsum(ROWS), rows, "right")
        steer.record(step, domains + 0.1 * (rows % 7), {"domain_id": domains, "document_ids": rows[:, None]})
    names = sorted(file.name for file in (tmp_path / "decisions").iterdir())
    assert names == [f"feedback-{step:09d}.json" for step in (8, 12, 16)]
    facts = json.loads((tmp_path / "decisions" / names[-1]).read_text())
    assert (facts["kind"], facts["step"], facts["utilities_until"]) == ("feedback", 16, 12)
    assert list(facts["domains"]) == ["a", "b", "c"]
    assert sum(d["weight"] for d in facts["domains"].values()) == pytest.approx(1)
    assert facts["domains"]["c"]["mean"] > facts["domains"]["a"]["mean"]
    assert facts["domains"]["c"]["scores"] > 10
    assert sum(c["share"] for c in facts["clusters"]) == pytest.approx(1)
    assert sum(c["base_share"] for c in facts["clusters"]) == pytest.approx(1)
    assert {c["label"] for c in facts["clusters"]} == {"one, two", "three"}
    assert 0.1 < facts["documents"]["share_top_tenth"] < 1
    assert all(example["share_ratio"] < 1 for example in facts["stopped_examples"])
    fresh().write_decisions(tmp_path, 7, describe(["a", "b", "c"]))
    assert sorted(file.name for file in (tmp_path / "decisions").iterdir()) == names[:1]


# ------------------------------------------------------------------------------------------- whole runs

FEEDBACK = (
    "feedback.enabled=true", "feedback.window_steps=3", "feedback.clusters=4", "selection.temperature=.inf",
    "selection.select_every=2", "selection.audit_every=0", "run.steps=16", "run.save_every=5",
)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("feedback.floor=0.4",), r"feedback.floor = 0.4: must be at most 1 / 3 domains"),
        (("feedback.max_epochs=0.001",), r"feedback.max_epochs = 0.001: the run draws \d+ rows from \d+"),
        (("corpus.weights={prose: 1.0, absent: 1.0}",), "absent"),
    ],
)
def test_what_the_corpus_cannot_give_is_refused_before_training(tmp_path, overrides, message):
    from opus_jax.training.loop import train

    with pytest.raises((ConfigError, UserError), match=message):
        train(small_config(tmp_path, *FEEDBACK, *overrides), progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
