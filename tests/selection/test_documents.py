"""The chooser of documents, a pure function: what holds of every buffer, and the law of the draws by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opus_jax.errors import UserError
from opus_jax.selection.documents import select

ROWS, COLUMNS = 6, 3
KEY = jax.random.key(0)
LAWS = [(temperature, k) for temperature in (0.0, 0.5, math.inf) for k in (3, 6)]
BROKEN = (math.nan, math.inf, -math.inf)


@jax.jit
def _at_once(utilities, present, share, key):
    """Compiled once."""
    return {
        (temperature, k): select(utilities, present, k, share=share, temperature=temperature, key=key)
        for temperature, k in LAWS
    }


def choose(utilities, present, k, *, share=0.5, temperature=0.0, seed=0):
    given_ = (jnp.asarray(utilities, jnp.float32), jnp.asarray(present, bool), share, jax.random.key(seed))
    indices, left_out, found = _at_once(*given_)[temperature, k]
    return np.asarray(indices), np.asarray(left_out), jax.tree.map(np.asarray, found)


values = st.one_of(st.floats(-3, 3, width=32), st.sampled_from([0.0, 1.0, *BROKEN]))
grids = st.lists(values, min_size=ROWS * COLUMNS, max_size=ROWS * COLUMNS)
places = st.lists(st.booleans(), min_size=ROWS * COLUMNS, max_size=ROWS * COLUMNS)


@settings(max_examples=60, deadline=None)
@given(grids, places, st.sampled_from(LAWS), st.floats(0.05, 1), st.integers(0, 99))
def test_what_holds_of_every_buffer(utilities, present, law, share, seed):
    temperature, k = law
    utilities, present = (np.array(x).reshape(ROWS, COLUMNS) for x in (utilities, present))
    indices, left_out, found = choose(utilities, present, k, share=share, temperature=temperature, seed=seed)
    sound = (np.isfinite(utilities) | ~present).all(1)
    assert len(set(indices.tolist())) == k
    assert (np.diff(indices) > 0).all()
    assert sound[indices].sum() == min(k, sound.sum()), "rows with a broken utility come last"
    assert not left_out[~present].any()
    assert not left_out[~sound].any()
    assert ((present & ~left_out).any(1) | ~present.any(1)).all(), "every row keeps a document if it has one"
    drawable = (present & sound[:, None]).sum()
    drawn = max(round(float(np.float32(share) * np.float32(drawable))), 1) if drawable else 0
    kept_anyway = (drawable - left_out.sum()) - drawn
    assert 0 <= kept_anyway <= ROWS
    assert int(found["nonfinite"]) == (~sound).sum()
    assert np.isfinite(found["z"]).all()
    np.testing.assert_allclose(found["probability"], np.isin(np.arange(ROWS), indices) / k)


def test_rows_are_worth_their_chosen_documents():
    """At temperature 0 the best half of the documents is chosen, and rows are ranked by what they got of it."""
    utilities = np.array([[9, -9, 0.0], [4, 4, 4], [5, 0, 0], [-1, -1, 3], [0, 0, 0], [1, 0, 0]])
    present = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    indices, left_out, _ = choose(utilities, present, 3)
    np.testing.assert_array_equal(indices, [0, 1, 2])  # six of twelve: 9, 4, 4, 4, 5, 3; sums 9, 12, 5, and 3 for row 3
    expected = [[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(left_out, expected)


def test_a_row_of_good_and_bad_documents_beats_one_of_middling_ones():
    """That is what the unit is for: whole rows would be ranked the other way."""
    utilities, present = np.array([[5.0, -6.0], [1.0, 1.0]]), np.ones((2, 2), bool)
    indices, left_out, _ = select(jnp.asarray(utilities), jnp.asarray(present), 1, share=0.5, temperature=0.0, key=KEY)
    assert int(indices[0]) == 0
    np.testing.assert_array_equal(left_out, [[False, True], [False, True]])


def test_a_row_without_chosen_documents_comes_after_those_with_and_keeps_its_best():
    utilities = -np.ones((ROWS, COLUMNS)) - np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS)[::-1]
    indices, left_out, _ = choose(utilities, np.ones_like(utilities, bool), 3, share=1 / 6)
    np.testing.assert_array_equal(indices, [3, 4, 5], "three documents of row 5 are chosen; 4 and 3 have the next best")
    np.testing.assert_array_equal(left_out, [[False, True, True]] * 5 + [[False] * 3])


def test_documents_are_drawn_by_the_softmax_of_their_z_scores():
    """One of four, so the draw is the first draw."""
    u = np.array([[1.0, 0.2], [-0.5, 0.4]])
    keys = jax.random.split(KEY, 4000)
    draw = jax.jit(
        jax.vmap(
            lambda key: select(jnp.asarray(u), jnp.ones((2, 2), bool), 1, share=0.25, temperature=0.7, key=key)[:2]
        )
    )
    indices, left_out = map(np.asarray, draw(keys))
    kept = ~left_out[np.arange(4000), indices[:, 0]]
    counts = np.zeros((2, 2))
    np.add.at(counts, indices[:, 0], kept)
    z = (u - u.mean()) / u.std()
    law = np.exp(z / 0.7) / np.exp(z / 0.7).sum()
    np.testing.assert_allclose(counts / 4000, law, atol=4 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_equal_utilities_give_random_rows_and_documents(temperature):
    present = np.tri(ROWS, COLUMNS, k=0, dtype=bool)
    picks = [choose(np.full((ROWS, COLUMNS), 0.1), present, 3, temperature=temperature, seed=s) for s in range(8)]
    assert len({tuple(indices.tolist()) for indices, _, _ in picks}) > 3
    assert len({left_out.tobytes() for _, left_out, _ in picks}) > 3
    assert all(found["degenerate"] for *_, found in picks)


def test_nothing_finite_still_gives_k_rows_and_leaves_nothing_out():
    indices, left_out, found = choose(np.full((ROWS, COLUMNS), np.nan), np.ones((ROWS, COLUMNS), bool), 3)
    assert len(indices) == 3
    assert not left_out.any()
    assert int(found["nonfinite"]) == ROWS


def test_all_documents_are_all_of_the_rows():
    u = np.random.default_rng(0).normal(size=(ROWS, COLUMNS))
    indices, left_out, _ = choose(u, np.ones_like(u, bool), 3, share=1.0)
    assert not left_out.any()
    np.testing.assert_array_equal(indices, np.sort(np.argsort(-u.sum(1))[:3]))


def test_the_entropy_is_that_of_the_first_document():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    found = select(u, jnp.ones((8, 4), bool), 2, share=0.5, temperature=0.5, key=KEY, entropy=0.8)[2]
    z = np.asarray((u - u.mean()) / u.std(), np.float64).ravel()
    p = np.exp(z / float(found["temperature"]))
    p /= p.sum()
    assert -(p * np.log(p)).sum() == pytest.approx(0.8 * np.log(32), abs=1e-3)


def test_mistakes_are_named():
    u, present = jnp.zeros((4, 2)), jnp.ones((4, 2), bool)
    with pytest.raises(UserError, match="cannot select 5 of 4 candidates"):
        select(u, present, 5, share=0.5, temperature=0.5, key=KEY)
    with pytest.raises(UserError, match="must be at least 0"):
        select(u, present, 2, share=0.5, temperature=-1.0, key=KEY)
