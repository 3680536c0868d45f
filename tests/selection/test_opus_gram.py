"""Redundancy, exactly: what chosen candidates take from the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from opus_jax.selection import opus
from tests.selection.oracle import sequential, subset_law

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
UTILITIES = jnp.asarray(RANDOM.normal(size=16), jnp.float32)
FEATURES = RANDOM.normal(size=(16, 6))
GRAM = jnp.asarray(0.1 * FEATURES @ FEATURES.T, jnp.float32)
SKEWED = GRAM + jnp.asarray(0.2 * RANDOM.normal(size=(16, 16)), jnp.float32)  # P need not be symmetric
select = jax.jit(opus.select, static_argnames=("k", "temperature"))


@pytest.mark.parametrize("gram", [GRAM, SKEWED])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_is_the_sequential_choice_worked_out_by_hand(gram, temperature):
    for seed in range(10):
        key = jax.random.key(seed)
        indices, found = select(UTILITIES, 6, temperature=temperature, key=key, gram=gram)
        order = sequential(UTILITIES, gram, 6, temperature, key)
        np.testing.assert_array_equal(indices, sorted(order))
        for place, i in enumerate(order):
            taken = sum(float(gram[i, j]) for j in order[:place])
            assert float(found["redundancy"][i]) == pytest.approx(taken, abs=1e-5)


def test_has_the_law_of_sequential_softmax_with_penalties():
    u, gram = np.asarray(UTILITIES[:5], np.float64), np.asarray(SKEWED[:5, :5], np.float64)
    own = u - np.diag(gram) / 2
    law = subset_law(lambda chosen: (own - gram[:, list(chosen)].sum(1)) / own.std() / 0.7, 3)
    draw = jax.vmap(lambda key: select(UTILITIES[:5], 3, temperature=0.7, key=key, gram=SKEWED[:5, :5])[0])
    rows, counts = np.unique(np.asarray(jax.jit(draw)(jax.random.split(KEY, 20000))), axis=0, return_counts=True)
    seen = dict.fromkeys(law, 0) | {tuple(r.tolist()): int(c) for r, c in zip(rows, counts, strict=True)}
    expected = np.array(list(law.values()))
    assert chisquare([seen[s] for s in law], expected / expected.sum() * 20000).pvalue > 1e-3


def duplicates():
    """Features of 4 pairs, of which the first two rows are the same and the best."""
    features = np.eye(8)
    features[1] = features[0]
    return jnp.asarray(features @ features.T, jnp.float32), jnp.array([3.0, 3.0, 2.5, 2.4, 2.3, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_duplicate_is_penalised_when_lambda_is_above_zero(strength):
    gram, utilities = duplicates()
    indices, found = select(utilities, 3, temperature=0.0, key=KEY, gram=strength * gram)
    assert indices.tolist() == ([0, 2, 3] if strength else [0, 1, 2])
    assert float(found["redundancy"][1]) == pytest.approx(strength)
    assert not found["redundancy"][2:].any()


def test_duplicates_meet_less_often_at_any_temperature():
    gram, utilities = duplicates()

    def both(strength):
        law = jax.vmap(lambda key: select(utilities, 3, temperature=0.5, key=key, gram=strength * gram)[0])
        picks = np.asarray(jax.jit(law)(jax.random.split(KEY, 500)))
        return float(((picks == 0).any(1) & (picks == 1).any(1)).mean())

    assert both(2.0) < 0.5 * both(0.0)


def test_no_gram_at_temperature_zero_is_top_k():
    plain, _ = select(UTILITIES, 6, temperature=0.0, key=KEY)
    zero, found = select(UTILITIES, 6, temperature=0.0, key=KEY, gram=jnp.zeros((16, 16)))
    np.testing.assert_array_equal(zero, plain)
    np.testing.assert_array_equal(zero, np.sort(np.argsort(-np.asarray(UTILITIES))[:6]))
    assert not found["redundancy"].any()


def test_z_and_first_draw_know_the_self_term():
    _, found = select(UTILITIES, 6, temperature=0.5, key=KEY, gram=GRAM)
    own = np.asarray(UTILITIES) - np.diag(GRAM) / 2
    z = (own - own.mean()) / own.std()
    np.testing.assert_allclose(found["z"], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["probability"], np.exp(2 * z) / np.exp(2 * z).sum(), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_unit_of_utilities_does_not_matter(scale):
    indices, found = select(UTILITIES, 6, temperature=0.5, key=KEY, gram=GRAM)
    scaled, found_scaled = select(scale * UTILITIES, 6, temperature=0.5, key=KEY, gram=scale * GRAM)
    np.testing.assert_array_equal(indices, scaled)
    np.testing.assert_allclose(found_scaled["redundancy"], scale * found["redundancy"], rtol=1e-3)


def test_greedy_choice_moves_with_a_permutation_of_the_candidates():
    order = np.random.default_rng(1).permutation(16)
    straight, found = select(UTILITIES, 6, temperature=0.0, key=KEY, gram=SKEWED)
    moved, found_moved = select(UTILITIES[order], 6, temperature=0.0, key=KEY, gram=SKEWED[order][:, order])
    assert set(order[np.asarray(moved)].tolist()) == set(straight.tolist())
    np.testing.assert_allclose(found_moved["redundancy"], found["redundancy"][order], atol=1e-5)


def test_the_law_moves_with_a_permutation_of_the_candidates():
    order = np.random.default_rng(1).permutation(16)
    keys = jax.random.split(KEY, 3000)

    def shares(utilities, gram):
        picks = jax.jit(jax.vmap(lambda key: select(utilities, 6, temperature=0.5, key=key, gram=gram)[0]))(keys)
        return np.bincount(np.asarray(picks).ravel(), minlength=16) / len(keys)

    straight, moved = shares(UTILITIES, GRAM), shares(UTILITIES[order], GRAM[order][:, order])
    np.testing.assert_allclose(moved, straight[order], atol=4 * np.sqrt(2 * 0.25 / len(keys)))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_same_under_jit(temperature):
    bare = opus.select(UTILITIES, 6, temperature=temperature, key=KEY, gram=GRAM)
    jitted = select(UTILITIES, 6, temperature=temperature, key=KEY, gram=GRAM)
    np.testing.assert_array_equal(bare[0], jitted[0])
    for name, value in bare[1].items():
        np.testing.assert_allclose(jitted[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("temperature", [0.0, 0.5, np.inf])
def test_broken_candidates_come_last_and_take_nothing_with_them(temperature):
    bad = jnp.array([1, 4])
    utilities = UTILITIES[:6].at[bad].set(jnp.nan)
    gram = GRAM[:6, :6].at[bad].set(jnp.nan).at[:, bad].set(jnp.inf)
    for k, expected in ((4, [0, 2, 3, 5]), (5, [0, 1, 2, 3, 5])):
        indices, found = select(utilities, k, temperature=temperature, key=KEY, gram=gram)
        np.testing.assert_array_equal(indices, expected)
        assert int(found["nonfinite"]) == 2
        assert all(np.isfinite(x).all() for x in found.values() if x.ndim)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_equal_utilities_are_chosen_at_random_and_said_so(temperature):
    equal, gram = jnp.full(16, 0.25), 0.01 * (jnp.ones((16, 16)) - jnp.eye(16))
    pick = lambda seed: select(equal, 4, temperature=temperature, key=jax.random.key(seed), gram=gram)  # noqa: E731
    assert len({tuple(pick(seed)[0].tolist()) for seed in range(8)}) > 1
    _, found = pick(0)
    assert bool(found["degenerate"])
    assert not found["redundancy"].any()
    np.testing.assert_allclose(found["probability"], np.full(16, 1 / 16))
