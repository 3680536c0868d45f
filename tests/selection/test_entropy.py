import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opus_jax.errors import UserError
from opus_jax.selection.entropy import temperature_for
from opus_jax.selection.opus import select

KEY = jax.random.key(0)
ROWS = 12
FEW_VALUES = st.sampled_from([-1.0, 0.0, 1e-6, 2.0, float("nan"), float("inf"), float("-inf")])
ANY_VALUE = st.floats(width=32)


@jax.jit
def pick(utilities, share_index):
    """The share is a Python number; all of them are compiled at once."""
    branches = [lambda u, s=s: select(u, 4, temperature=0.5, key=KEY, entropy=s) for s in SHARES]
    return jax.lax.switch(share_index, branches, utilities)


SHARES = (0.1, 0.5, 0.9, 1.0)


def entropy_of(probability):
    p = np.asarray(probability, np.float64)
    return -(p[p > 0] * np.log(p[p > 0])).sum()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(FEW_VALUES, min_size=ROWS, max_size=ROWS) | st.lists(ANY_VALUE, min_size=ROWS, max_size=ROWS),
    share=st.integers(0, len(SHARES) - 1),
)
@example(values=[1.0] * ROWS, share=1)
@example(values=[float("nan")] * ROWS, share=1)
@example(values=[1.0, np.float32(1 + 2e-7), *[0.0] * (ROWS - 2)], share=0)
def test_the_first_draw_has_the_entropy_asked_for(values, share):
    values = np.asarray(values, np.float32)
    indices, found = pick(values, share)
    finite = np.isfinite(values)
    assert len(set(indices.tolist())) == 4
    assert all(np.isfinite(x).all() for x in found.values())
    if bool(found["degenerate"]):
        among = finite if finite.any() else np.ones(ROWS, bool)
        np.testing.assert_allclose(found["probability"], among / among.sum())
        return
    z = np.asarray(found["z"])
    best = (z[finite] == z[finite].max()).sum()  # equal ones stay equally probable at any temperature
    wanted = max(SHARES[share] * np.log(finite.sum()), np.log(best))
    assert entropy_of(found["probability"]) == pytest.approx(wanted, abs=1e-3 * np.log(finite.sum()))
    assert not found["probability"][~finite].any()


def test_draws_follow_the_probabilities_where_the_best_are_nearly_equal():
    """At the temperature this takes, about 1e-7, logits not taken from the best would swallow the noise."""
    utilities = jnp.array([1.0, 1.0 + 2.4e-7, *[0.0] * 10])
    draw = lambda key: select(utilities, 1, temperature=0.5, key=key, entropy=0.2)  # noqa: E731
    picks, found = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 20000))
    expected = np.asarray(found["probability"][0])[:2]
    assert 0.02 < expected.min() < 0.4
    np.testing.assert_allclose([(picks == i).mean() for i in (0, 1)], expected, atol=0.012)


def test_the_temperature_in_use_is_the_one_reported():
    utilities = jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.float32)
    indices, found = select(utilities, 8, temperature=99.0, key=KEY, entropy=0.7)
    same, at_that = select(utilities, 8, temperature=float(found["temperature"]), key=KEY)
    np.testing.assert_array_equal(indices, same)
    np.testing.assert_allclose(found["probability"], at_that["probability"], rtol=1e-4)
    assert 0.05 < float(found["temperature"]) < 5


def test_more_entropy_is_a_higher_temperature():
    z = jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.float32)
    found = [float(jax.jit(lambda z, s=s: temperature_for(z, s))(z)) for s in (0.05, 0.3, 0.6, 0.9, 0.99)]
    assert found == sorted(found)
    assert found[-1] > 10 * found[0]


def test_works_with_a_gram_matrix():
    utilities = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)
    _, found = select(utilities, 4, temperature=0.5, key=KEY, entropy=0.5, gram=0.3 * jnp.eye(16))
    assert entropy_of(found["probability"]) == pytest.approx(0.5 * np.log(16), abs=1e-3)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_shares_are_named(share):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        select(jnp.arange(8.0), 2, temperature=0.5, key=KEY, entropy=share)
