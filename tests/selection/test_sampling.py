import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from opus_jax.errors import UserError
from opus_jax.selection.sampling import boltzmann, gumbel_top_k, top_k

KEY = jax.random.key(0)


def subset_law(logits, k):
    """Probability of every subset under k draws from the softmax over what remains."""
    weights = np.exp(logits)
    law = dict.fromkeys(itertools.combinations(range(len(logits)), k), 0.0)
    for order in itertools.permutations(range(len(logits)), k):
        left, p = weights.sum(), 1.0
        for i in order:
            p, left = p * weights[i] / left, left - weights[i]
        law[tuple(sorted(order))] += p
    return law


def draws(sample, count):
    return np.asarray(jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(1), count)))


@pytest.mark.parametrize("logits", [[0.0, 0.5, 1.0, -1.0, 2.0, 0.3], [0.0] * 6])
def test_gumbel_top_k_has_the_law_of_sequential_softmax(logits):
    law, count = subset_law(np.array(logits), 3), 20000
    drawn = draws(lambda key: gumbel_top_k(jnp.array(logits), 3, key), count)
    seen = dict.fromkeys(law, 0)
    for row in drawn:
        seen[tuple(row.tolist())] += 1
    expected = np.array([law[s] for s in law]) * count
    assert chisquare([seen[s] for s in law], expected * (count / expected.sum())).pvalue > 1e-3


def test_first_draw_probability_is_the_softmax_at_this_temperature():
    scores = jnp.array([0.0, 1.0, 2.0, 4.0])
    _, probability = boltzmann(scores, 1, temperature=2.0, key=KEY)
    np.testing.assert_allclose(probability, jax.nn.softmax(scores / 2), rtol=1e-6)
    first = draws(lambda key: boltzmann(scores, 1, temperature=2.0, key=key)[0][0], 20000)
    expected = np.asarray(probability, np.float64)
    assert chisquare(np.bincount(first, minlength=4), expected * (20000 / expected.sum())).pvalue > 1e-3


def test_temperature_zero_is_top_k_with_the_earlier_of_equals():
    scores = jnp.array([1.0, 3.0, 2.0, 3.0, 2.0])
    indices, probability = boltzmann(scores, 3, temperature=0.0, key=KEY)
    np.testing.assert_array_equal(indices, [1, 2, 3])
    np.testing.assert_allclose(probability, [0, 1 / 3, 1 / 3, 1 / 3, 0])


def test_infinite_temperature_is_uniform_whatever_the_scores():
    scores = jnp.array([1e9, 0.0, -1e9, 5.0])
    _, probability = boltzmann(scores, 2, temperature=math.inf, key=KEY)
    np.testing.assert_allclose(probability, np.full(4, 0.25))
    drawn = draws(lambda key: boltzmann(scores, 2, temperature=math.inf, key=key)[0], 4000)
    assert chisquare(np.bincount(drawn.ravel(), minlength=4)).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.5, math.inf])
def test_no_temperature_gives_nan_and_impossible_scores_come_last(temperature):
    scores = jnp.array([-jnp.inf, 1.1, 2.3, 0.7])
    indices, probability = jax.jit(lambda s: boltzmann(s, 3, temperature=temperature, key=KEY))(scores)
    np.testing.assert_array_equal(indices, [1, 2, 3])
    assert np.all(np.isfinite(probability))
    assert float(probability.sum()) == pytest.approx(1)


def test_positions_are_sorted_distinct_int32():
    indices = gumbel_top_k(jnp.zeros(50), 20, KEY)
    assert indices.dtype == jnp.int32
    assert np.all(np.diff(indices) > 0)
    np.testing.assert_array_equal(gumbel_top_k(jnp.zeros(5), 5, KEY), np.arange(5))


def test_nan_counts_as_lowest():
    np.testing.assert_array_equal(top_k(jnp.array([jnp.nan, 1.0, 2.0]), 2), [1, 2])
    np.testing.assert_array_equal(gumbel_top_k(jnp.array([1.0, jnp.nan, 2.0]), 2, KEY), [0, 2])


@pytest.mark.parametrize("k", [0, 4])
def test_impossible_sizes_are_named(k):
    with pytest.raises(UserError, match=f"cannot select {k} of 3"):
        gumbel_top_k(jnp.zeros(3), k, KEY)


@pytest.mark.parametrize("temperature", [-0.1, math.nan])
def test_impossible_temperatures_are_named(temperature):
    with pytest.raises(UserError, match="at least 0"):
        boltzmann(jnp.zeros(3), 1, temperature=temperature, key=KEY)
