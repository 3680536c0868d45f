"""Feedback: what raises a group's share, what lowers it, and what no score can do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opus_jax.config import FeedbackConfig
from opus_jax.data.plan import Plan, fitted
from opus_jax.errors import ConfigError
from opus_jax.selection.feedback import (
    Buffer,
    FeedbackState,
    effective_counts,
    estimated_shrinkage,
    standard_errors,
    standardised,
    start,
    update,
    water_fill,
)
from opus_jax.selection.groups import domain_groups, nested_groups

ROWS = [1000, 800, 1200, 400]
GOOD, BAD = 1, 2
EFFECT = np.array([0.0, 1.0, -1.0, 0.3])


def fresh(**changes) -> FeedbackState:
    return start(domain_groups(ROWS), settings=FeedbackConfig(**{"groups": ["domain"], "floor": 0.02, **changes}))


def run(state: FeedbackState, windows: int, effect=EFFECT, *, slots=64, seed=0) -> tuple[FeedbackState, np.ndarray]:
    """Windows of two buffers of 64 candidates drawn by the plan; the last plan's weights."""
    dice = np.random.default_rng(seed)
    weights = state.base
    for _ in range(windows):
        for _ in range(2):
            domains = dice.choice(len(effect), 64, p=weights / weights.sum())
            state = state.observe(1e-4 * (dice.normal(size=64) + effect[domains]), domains)
        state, proposal = state.close().propose(slots)
        weights = proposal.weights
    return state, weights


def test_a_good_group_rises_and_a_bad_one_falls():
    state = fresh()
    _, weights = run(state, 6)
    assert weights.sum() == pytest.approx(1)
    assert weights[GOOD] > 2 * state.base[GOOD]
    assert weights[BAD] < 0.3 * state.base[BAD]
    assert weights[GOOD] == weights.max()


def test_it_recovers_when_the_good_group_changes():
    state, before = run(fresh(decay=0.7), 8)
    turned = EFFECT[[0, 2, 1, 3]]
    _, after = run(state, 14, turned, seed=1)
    assert before[GOOD] > 0.5
    assert after[BAD] > 0.5
    assert after[GOOD] < 0.2


def test_no_domain_starves_below_the_floor():
    _, weights = run(fresh(temperature=0.01), 8)
    assert weights.min() >= 0.02 - 1e-12
    assert weights.max() > 0.9


def test_a_domain_without_a_share_at_the_start_is_never_offered():
    groups = domain_groups(ROWS)
    state = start(groups, np.array([0.5, 0.5, 0.0, 0.0]), FeedbackConfig(groups=["domain"], floor=0.3))
    weights = state.observe(np.arange(8.0), np.array([0, 1] * 4)).close().propose(10)[1].weights
    np.testing.assert_array_equal(weights[2:], 0)
    assert weights.min() == 0
    assert weights[:2].min() >= 0.3


def test_it_begins_with_the_first_plan_and_keeps_out_what_that_left_out():
    groups = nested_groups(["domain", "document"], np.array([6, 6]), np.arange(12)[:, None], 12)
    priorities = np.array([1, 1, 4, 0, 0, 0] + 6 * [1.0])
    state = start(groups, np.array([0.75, 0.25]), FeedbackConfig(max_epochs=None, floor=0.0), priorities)
    np.testing.assert_allclose(state.base[:6], 0.75 * np.array([1, 1, 4, 0, 0, 0]) / 6)
    np.testing.assert_allclose(
        state.propose(8)[1].priorities, np.append(0.125 * priorities[:6], 6 * [0.25 / 6]), rtol=1e-5
    )
    state = state.observe(np.arange(12.0), np.repeat([0, 1], 6), np.arange(12)[:, None]).close()
    proposal = state.propose(8)[1]
    np.testing.assert_array_equal(proposal.priorities[3:6], 0)
    assert proposal.weights[1] > 0.25


def test_shuffled_scores_teach_nothing():
    state, weights = run(fresh(shuffle=True), 10)
    assert np.abs(weights - state.base).max() < 0.25
    assert abs(np.log(weights / state.base)[GOOD] - np.log(weights / state.base)[BAD]) < 1


def test_worths_do_not_depend_on_what_the_stream_offers():
    """With plain z-scores a good domain that fills the buffer would look average, and a bad one would hardly change."""
    dice = np.random.default_rng(0)
    found = []
    for shares in ([0.25] * 4, [0.05, 0.85, 0.05, 0.05]):
        state = fresh(decay=0.98, shrinkage=1.0)
        for _ in range(60):
            domains = dice.choice(4, 64, p=shares)
            state = state.observe(dice.normal(size=64) + EFFECT[domains], domains).close()
        worth = state.worths()[0]
        found.append(worth[GOOD] - worth[BAD])
    np.testing.assert_allclose(found, 2.0, atol=0.35)


def test_little_seen_groups_borrow_from_their_parent():
    """Two documents of a good domain: one seen often and bad, one never seen."""
    documents = np.arange(40)[:, None]
    groups = nested_groups(["domain", "document"], np.array([20, 20]), documents, 40)
    state = start(groups, settings=FeedbackConfig(shrinkage=4.0, max_epochs=None))
    dice = np.random.default_rng(0)
    for _ in range(30):
        rows = np.append(dice.integers(0, 10, 16), dice.integers(20, 40, 16))  # documents 10 to 19 are never seen
        scores = np.where(rows < 20, 1.0, -1.0) + 0.3 * dice.normal(size=32) - 3.0 * (rows == 3)
        state = state.observe(scores, (rows >= 20).astype(int), rows[:, None])
    domain, document = state.close().worths()
    assert document[3] < domain[0] - 0.5
    assert document[15] == pytest.approx(domain[0])
    priorities = state.close().propose(10)[1].priorities
    assert priorities[15] > 1.5 * priorities[3]
    assert priorities[3] > 0, "no document is given up"
    assert priorities[:20].sum() > 2 * priorities[20:].sum()


@pytest.mark.parametrize("decay", [1.0, 0.8])
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_shrinkage_is_estimated_from_how_far_groups_differ(spread, decay):
    """Scores of spread 1 within 60 groups whose worths have a known spread: the ratio of the variances."""
    dice = np.random.default_rng(0)
    found = []
    for _ in range(20):
        worths, sums = spread * dice.normal(size=60), np.zeros((60, 4))
        for _ in range(12):
            sums *= [decay, decay, decay, decay**2]
            group = dice.integers(0, 60, 240)
            z = worths[group] + dice.normal(size=240)
            for column, values in enumerate((np.ones(240), z, z * z, np.ones(240))):
                sums[:, column] += np.bincount(group, values, 60)
        found.append(estimated_shrinkage(sums, np.zeros(60)))
    assert np.median(found) == pytest.approx(1 / spread**2, rel=0.25)


def test_groups_that_do_not_differ_are_not_told_apart():
    dice, sums = np.random.default_rng(1), np.zeros((40, 4))
    group, z = dice.integers(0, 40, 4000), dice.normal(size=4000)
    for column, values in enumerate((np.ones(4000), z, z * z, np.ones(4000))):
        sums[:, column] += np.bincount(group, values, 40)
    assert estimated_shrinkage(sums, np.zeros(40)) > 100
    assert estimated_shrinkage(np.zeros((40, 4)), np.zeros(40)) == np.inf


def test_decayed_scores_count_for_less_but_not_too_little():
    sums = np.zeros((1, 4))
    for _ in range(400):
        sums = sums * [0.9, 0.9, 0.9, 0.81] + [[5, 0, 5, 5]]
    assert effective_counts(sums)[0] == pytest.approx(5 * 1.9 / 0.1, rel=1e-3)
    assert standard_errors(sums)[0] == pytest.approx(1 / np.sqrt(94), rel=1e-2)


def test_clusters_count_within_their_domain():
    documents, clusters = np.arange(12)[:, None], np.array([0, 1] * 6)
    groups = nested_groups(["domain", "cluster"], np.array([6, 6]), documents, 12, clusters, ["alpha", "beta"])
    assert groups.sizes == (2, 4)
    assert groups.labels == ((0, "alpha"), (1, "beta"), (0, "alpha"), (1, "beta"))
    np.testing.assert_array_equal(groups.unit_rows, 3)
    state = start(groups, settings=FeedbackConfig(groups=["domain", "cluster"], shrinkage=0.1, max_epochs=None))
    scores = np.where(clusters == 1, 1.0, 0.0) * np.where(np.arange(12) < 6, 1, -1) + 0.01 * np.arange(12)
    for _ in range(4):
        state = state.observe(scores, np.repeat([0, 1], 6), documents)
    priorities = state.close().propose(10)[1].priorities
    assert priorities[1] > priorities[0], "cluster 1 helps in the first domain"
    assert priorities[7] < priorities[6], "and harms in the second"


def test_passes_stop_at_the_limit():
    state = start(domain_groups([10, 1000]), np.array([0.5, 0.5]), FeedbackConfig(groups=["domain"], max_epochs=2.0))
    drawn = np.zeros(2)
    for _ in range(12):
        state = state.observe(np.array([1.0, 1.1, 0.0, 0.1]), np.array([0, 0, 1, 1])).close()
        state, proposal = state.propose(50)
        drawn += proposal.weights * 50
    assert drawn[0] == pytest.approx(20)
    assert state.exposure[0] == pytest.approx(2.0)
    assert proposal.weights[0] == pytest.approx(0, abs=1e-12)


def test_rows_of_two_documents_count_half_for_each():
    groups = nested_groups(["domain", "document"], np.array([2]), np.array([[0, 1], [1, -1]]), 3)
    np.testing.assert_array_equal(groups.unit_rows, [0.5, 1.5, 0])
    np.testing.assert_array_equal(groups.members[0], [0, 1, -1])
    state = start(groups, settings=FeedbackConfig(max_epochs=None))
    state = state.observe(np.array([0.0, 1.0]), np.zeros(2, int), np.array([[0, 1], [1, -1]])).close()
    np.testing.assert_array_equal(state.sums[1][:, 0], [0.5, 1.5, 0])


def test_scores_that_say_nothing_change_nothing():
    state = fresh()
    for scores in (np.full(8, np.nan), np.ones(8), np.zeros(8)):
        state = state.observe(scores, np.arange(8) % 4)
    state, proposal = state.close().propose(64)
    np.testing.assert_allclose(proposal.weights, fresh().propose(64)[1].weights)
    assert np.isfinite(proposal.weights).all()


def test_a_checkpoint_keeps_everything():
    state, _ = run(fresh(), 3)
    state = state.observe(np.arange(5.0), np.array([0, 1, 2, 3, 0]))
    again = fresh().restored(state.to_arrays())
    np.testing.assert_array_equal(again.close().propose(64)[1].weights, state.close().propose(64)[1].weights)
    assert again.windows == state.windows


def test_update_gives_a_plan_for_anyones_stream():
    state = start(3)
    for _ in range(4):
        utilities = np.array([0.1, 0.2, 1.1, 1.2, -1.0, -0.9])
        state, plan = update(state, utilities, np.array([0, 0, 1, 1, 2, 2]))
    assert isinstance(plan, Plan)
    assert np.argmax(plan.domain_weights) == 1
    assert fitted(plan, np.array([5, 5, 5])).domain_weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fresh(floor=0.3), r"feedback.floor = 0.3: must be at most 1 / 4 domains = 0.25"),
        (lambda: start(domain_groups([10, 0]), np.array([0.5, 0.5])), "group 1.* no rows"),
        (lambda: start(domain_groups([10, 10]), np.zeros(2)), "give one a weight"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_water_fill_keeps_capacities_and_proportions(data):
    size = data.draw(st.integers(1, 8))
    shares = np.array(data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)))
    capacity = np.array(data.draw(st.lists(st.floats(0, 3) | st.just(np.inf), min_size=size, max_size=size)))
    shares[shares < 1e-6], capacity[capacity < 1e-6] = 0, 0
    if not shares.sum() or capacity[shares > 0].sum() <= 1.001:
        return
    filled = water_fill(shares / shares.sum(), capacity)
    assert filled.sum() == pytest.approx(1)
    assert (filled <= capacity + 1e-9).all()
    free = (filled < capacity - 1e-9) & (shares > 0)
    ratios = filled[free] / shares[free]
    assert np.ptp(ratios) <= 1e-6 * max(ratios.max(initial=0), 1), "what is not full keeps its proportions"


def test_standardised_is_blind_to_scale_and_offset():
    dice = np.random.default_rng(0)
    domains = dice.integers(0, 3, 50)
    scores = dice.normal(size=50) + domains

    def z(values):
        return standardised(Buffer(values, domains, np.full((50, 1), -1)), np.zeros(3))

    np.testing.assert_allclose(z(scores), z(1e-7 * scores + 3e-7), atol=1e-6)
    assert z(scores).mean() == pytest.approx(0, abs=1e-9)
