import jax.numpy as jnp
import numpy as np

from opus_jax.models.attention import attend, attention_mask

RANDOM = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def test_mask_is_causal_within_segments_and_never_empty():
    mask = attention_mask(jnp.asarray([[1, 1, 2, 0, 0]]))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(mask[0], np.asarray(expected, bool))


def test_grouped_queries_equal_repeated_keys_and_values():
    q, k, v = array(2, 6, 6, 4), array(2, 6, 2, 4), array(2, 6, 2, 4)
    mask = attention_mask(jnp.asarray([[1, 1, 1, 2, 2, 2], [1] * 6]))
    repeated = attend(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), repeated, rtol=1e-5, atol=1e-6)


def test_huge_scores_stay_finite():
    q, k, v = 1e4 * array(1, 4, 1, 4), 1e4 * array(1, 4, 1, 4), array(1, 4, 1, 4)
    assert np.isfinite(attend(q, k, v, attention_mask(jnp.asarray([[0, 0, 1, 1]])))).all()
