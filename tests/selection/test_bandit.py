"""The loss-driven domain bandit, against its formulas."""

import numpy as np
import pytest

from opus_jax.config import FeedbackConfig
from opus_jax.selection import bandit
from opus_jax.selection.groups import domain_groups

SETTINGS = FeedbackConfig(signal="odm", groups=["domain"], decay=0.5)


def fresh(base=(0.25, 0.25, 0.5)):
    return bandit.start(domain_groups([10, 10, 20]), np.array(base), SETTINGS)


def test_one_round_follows_the_formulas():
    state = fresh().observe(np.array([2.0, 4.0, 1.0, np.nan]), np.array([0, 0, 2, 1])).close()
    np.testing.assert_allclose(state.rewards, [0.5 * 3.0 / 0.25, 0.0, 0.5 * 1.0 / 0.5])
    for _ in range(8):
        state = state.observe(np.array([1.0]), np.array([1]))
    _, proposal = state.propose(64)
    explored, before = np.sqrt(np.log(3) / 27), np.sqrt(np.log(3) / 24)
    law = np.exp(before * state.rewards)
    np.testing.assert_allclose(proposal.weights, (1 - 3 * explored) * law / law.sum() + explored)


def test_it_prefers_what_is_hard_and_explores_the_rest():
    state, dice = fresh(), np.random.default_rng(0)
    for _ in range(60):
        domains = dice.choice(3, 32, p=state.shares / state.shares.sum())
        state, proposal = state.observe(np.array([1.0, 3.0, 0.5])[domains], domains).close().propose(32)
    assert np.argmax(proposal.weights) == 1
    assert proposal.weights.sum() == pytest.approx(1)
    assert proposal.weights.min() >= np.sqrt(np.log(3) / (3 * 60)) - 1e-9


def test_what_is_not_offered_stays_so():
    state = fresh((0.5, 0.0, 0.5)).observe(np.ones(4), np.array([0, 0, 2, 2])).close()
    weights = state.propose(8)[1].weights
    assert weights[1] == 0
    assert weights.sum() == pytest.approx(1)


def test_a_checkpoint_keeps_everything():
    state, _ = fresh().observe(np.array([2.0, 1.0]), np.array([0, 1])).close().propose(8)
    state = state.observe(np.array([5.0]), np.array([2]))
    again = fresh().restored(state.to_arrays())
    np.testing.assert_array_equal(again.close().propose(8)[1].weights, state.close().propose(8)[1].weights)
