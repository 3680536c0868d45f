import dataclasses

import numpy as np
import pytest
from small_corpus import prepare_small, small_config

from opus_jax.data.plan import Plan, advance, drawn_before, initial_plan, rows_at
from opus_jax.data.records import Manifest, RowReader
from opus_jax.errors import ConfigError, UserError

N = 12


def plan_of(weights, rows, **changes):
    nothing = np.zeros(len(rows), np.int64)
    plan = Plan(np.array(weights, np.float64), None, 0, nothing, np.array(rows, np.int64), nothing)
    return dataclasses.replace(plan, **changes)


def stream(plan, steps, seed=0):
    return np.concatenate([rows_at(plan, seed, t * N, N) for t in steps])


def domains(rows, plan):
    return np.searchsorted(np.cumsum(plan.domain_rows), rows, side="right")


def test_rows_of_a_domain_come_once_in_every_epoch():
    plan = plan_of([3, 1, 2], [40, 7, 100])
    rows = stream(plan, range(80))
    for domain, count in enumerate(plan.domain_rows):
        own = rows[domains(rows, plan) == domain]
        orders = [own[e * count : (e + 1) * count] for e in range(len(own) // count)]
        for order in orders:
            assert np.array_equal(np.sort(order), np.sort(orders[0]))
            assert len(set(order.tolist())) == count
        assert len({tuple(o) for o in orders}) == len(orders)  # each epoch in another order


def test_domain_shares_are_exact_up_to_a_few_rows_at_any_time():
    plan = plan_of([5, 0, 1.5], [40, 7, 100])
    for steps in (1, 7, 50):
        counts = np.bincount(domains(stream(plan, range(steps)), plan), minlength=3)
        assert np.abs(counts - steps * N * np.array([5, 0, 1.5]) / 6.5).max() < 3
        assert np.array_equal(counts, drawn_before(plan, steps * N))


def test_a_step_needs_no_earlier_step_and_depends_on_the_seed():
    plan = plan_of([3, 1], [40, 7])
    late = rows_at(plan, 0, 10**9 * N, N)
    assert np.array_equal(late, rows_at(plan, 0, 10**9 * N, N))
    assert not np.array_equal(late, rows_at(plan, 1, 10**9 * N, N))
    assert not np.array_equal(late, rows_at(plan, 0, (10**9 + 1) * N, N))


def test_advancing_without_change_changes_nothing():
    plan = plan_of([3, 1, 2], [40, 7, 100])
    later = advance(advance(plan, 5 * N), 13 * N)
    assert later.first_slot == 13 * N
    assert np.array_equal(later.drawn, drawn_before(plan, 13 * N))
    assert np.array_equal(stream(later, range(13, 60)), stream(plan, range(13, 60)))


def test_new_weights_hold_from_the_boundary_and_epochs_go_on():
    plan = plan_of([1, 1], [30, 1000])
    later = advance(plan, 4 * N, weights=np.array([0.1, 0.9]))
    rows = np.concatenate([stream(plan, range(4)), stream(later, range(4, 9))])
    own = rows[rows < 30]
    assert len(set(own.tolist())) == min(len(own), 30) == 30
    share = (stream(later, range(4, 54)) < 30).mean()
    assert abs(share - 0.1) < 0.01


def test_priorities_set_how_often_rows_come():
    plan = plan_of([1, 1], [50, 50])
    documents = np.stack([np.arange(100), np.full(100, -1)], 1)
    documents[10, 1] = 11  # row 10 holds two documents: their mean counts
    priorities = np.ones(100, np.float32)
    priorities[:10] = 0.0
    priorities[[10, 11]] = 0.0, 6.0
    later = advance(plan, 3 * N, priorities=priorities, row_documents=documents)
    assert later.row_repeats[:50].sum() == later.row_repeats[50:].sum() == 50
    assert not later.row_repeats[:10].any()
    scale = 50 / (38 + 3 + 6)
    assert np.abs(later.row_repeats[10:12] - np.array([3, 6]) * scale).max() < 1
    assert (later.row_repeats[50:] == 1).all()
    rows = stream(later, range(3, 103))
    own = rows[rows < 50][:600]
    assert np.array_equal(np.bincount(own, minlength=50)[:50], 12 * later.row_repeats[:50])


def test_over_many_plans_every_row_gets_its_share():
    plan = plan_of([1], [40])
    priorities = np.linspace(0.2, 1.8, 40).astype(np.float32)
    documents = np.arange(40)[:, None]
    repeats = [advance(plan, s * N, priorities=priorities, row_documents=documents).row_repeats for s in range(200)]
    assert np.abs(np.mean(repeats, 0) - priorities).max() < 0.03


def test_a_domain_whose_priorities_stay_goes_on_and_another_starts_afresh():
    plan = plan_of([1, 1], [60, 60])
    documents = np.arange(120)[:, None]
    priorities = np.ones(120, np.float32)
    priorities[60] = 5.0
    later = advance(plan, 4 * N, priorities=priorities, row_documents=documents)
    assert later.epoch_origin.tolist() == [0, later.drawn[1]]
    before, after = stream(plan, range(4, 8)), stream(later, range(4, 8))
    assert np.array_equal(before[before < 60], after[after < 60])
    assert not np.array_equal(before[before >= 60], after[after >= 60])
    again = advance(later, 6 * N, priorities=priorities * 3, row_documents=documents)
    assert again.epoch_origin[0] == 0


@pytest.mark.parametrize("value", [0.1, 0.3, 7.0])
def test_equal_priorities_are_no_priorities(value):
    plan = plan_of([1, 2], [997, 1003])
    documents = np.arange(2000)[:, None]
    for step in (0, 3, 1000):
        later = advance(plan, step * N, priorities=np.full(2000, value, np.float32), row_documents=documents)
        assert (later.row_repeats == 1).all()
        assert np.array_equal(rows_at(later, 0, (step + 2) * N, N), rows_at(plan, 0, (step + 2) * N, N))


def test_a_plan_survives_the_checkpoint():
    plan = plan_of([3, 1], [40, 7])
    priorities = np.linspace(0, 2, 47).astype(np.float32)
    for original in (plan, advance(plan, 9 * N, priorities=priorities, row_documents=np.arange(47)[:, None])):
        arrays = original.to_arrays()
        assert all(isinstance(a, np.ndarray) for a in arrays.values())
        again = Plan.from_arrays(arrays)
        assert np.array_equal(stream(again, range(9, 30)), stream(original, range(9, 30)))
        assert isinstance(again.first_slot, int)
        assert (again.priorities is None) == (original.priorities is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": np.array([1.0, -1.0])}, "at least 0"),
        ({"weights": np.array([1.0])}, "2 finite values"),
        ({"weights": np.zeros(2)}, "not all 0"),
        ({"weights": np.array([1.0, np.nan])}, "finite"),
        ({"priorities": np.ones(47)}, "documents of every training row"),
        ({"priorities": np.ones(40), "row_documents": np.arange(47)[:, None]}, "40 values"),
        ({"priorities": -np.ones(47), "row_documents": np.arange(47)[:, None]}, "at least 0"),
        ({"priorities": (np.arange(47) < 40) * 1.0, "row_documents": np.arange(47)[:, None]}, "set the weight to 0"),
    ],
)
def test_unusable_changes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        advance(plan_of([3, 1], [40, 7]), 2 * N, **changes)


def test_slots_before_the_plan_are_refused():
    later = advance(plan_of([3, 1], [40, 7]), 5 * N)
    with pytest.raises(UserError, match="begins at slot 60"):
        rows_at(later, 0, 4 * N, N)
    with pytest.raises(UserError, match="begins at slot 60"):
        advance(later, 4 * N)


def test_a_weight_on_a_domain_without_rows_is_refused():
    with pytest.raises(UserError, match="has no rows"):
        advance(plan_of([3, 0], [40, 0]), 2 * N, weights=np.array([1.0, 1.0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_small(tmp_path_factory.mktemp("plan"))


class TestInitialPlan:
    def test_domains_come_by_their_rows_unless_weights_say_otherwise(self, folder, tmp_path):
        manifest = Manifest.load(folder)
        plan = initial_plan(manifest, small_config(tmp_path))
        assert plan.domain_weights.tolist() == plan.domain_rows.tolist()
        assert plan.domain_rows.sum() == len(RowReader(folder, "train"))
        weighted = initial_plan(manifest, small_config(tmp_path, corpus={"weights": {"code": 2.0, "tables": 1.0}}))
        assert weighted.domain_weights.tolist() == [0.0, 2.0, 1.0]

    def test_an_unknown_domain_is_refused_with_the_nearest(self, folder, tmp_path):
        config = small_config(tmp_path, corpus={"weights": {"tabels": 1.0}})
        with pytest.raises(ConfigError, match=r"corpus.weights.tabels = 1.0: .*nearest is tables"):
            initial_plan(Manifest.load(folder), config)

    def test_a_weight_without_rows_is_refused(self, folder, tmp_path):
        manifest = Manifest.load(folder)
        rows = manifest.rows | {"train": manifest.rows["train"] | {"code": 0}}
        manifest = dataclasses.replace(manifest, rows=rows)
        with pytest.raises(UserError, match="domain 'code' has weight 1 and no rows"):
            initial_plan(manifest, small_config(tmp_path, corpus={"weights": {"code": 1.0}}))
