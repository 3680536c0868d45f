import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.selection import greats
from tests.selection.oracle import sequential

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(3)
ALIGNMENT = jnp.asarray(RANDOM.normal(size=12), jnp.float32)
FEATURES = RANDOM.normal(size=(12, 5))
GRAM = jnp.asarray(FEATURES @ FEATURES.T, jnp.float32)

select = jax.jit(greats.select, static_argnames="k")


def test_is_the_greedy_choice_worked_out_by_hand():
    for rate in (1e-3, 0.3, 3.0):
        indices, found = select(ALIGNMENT, GRAM, 5, learning_rate=rate, key=KEY)
        order = sequential(
            rate * ALIGNMENT, rate**2 * np.asarray(GRAM, np.float64), 5, 0.0, KEY, self_term=False, scale=1.0
        )
        np.testing.assert_array_equal(indices, sorted(order))
        taken = [rate**2 * sum(float(GRAM[i, j]) for j in order[:place]) for place, i in enumerate(order)]
        np.testing.assert_allclose(found["redundancy"][jnp.array(order)], taken, rtol=1e-4, atol=1e-6)


def test_a_small_rate_is_top_k_and_a_large_one_is_not():
    small, large = (select(ALIGNMENT, GRAM, 5, learning_rate=r, key=KEY)[0] for r in (1e-6, 3.0))
    np.testing.assert_array_equal(small, np.sort(np.argsort(-np.asarray(ALIGNMENT))[:5]))
    assert small.tolist() != large.tolist()


def test_broken_candidates_come_last():
    indices, found = select(ALIGNMENT.at[2].set(jnp.nan), GRAM.at[2].set(jnp.nan), 11, learning_rate=0.1, key=KEY)
    assert 2 not in indices.tolist()
    assert int(found["nonfinite"]) == 1
    np.testing.assert_allclose(found["probability"][indices], np.full(11, 1 / 11), rtol=1e-6)
