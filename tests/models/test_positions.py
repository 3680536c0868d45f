import jax.numpy as jnp
import numpy as np

from opus_jax.models.positions import rotary_turns, rotate, segment_positions


def test_positions_restart_with_every_segment():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [5] * 8])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_rotated_products_depend_on_the_distance_only():
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(at, other):
        turned = [rotate(x, rotary_turns(jnp.asarray([[p]]), 8, 100.0)) for x, p in ((q, at), (k, other))]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(product(7, 4), product(103, 100), rtol=1e-4)
    assert abs(product(7, 4) - product(7, 5)) > 1e-3
    np.testing.assert_allclose(product(0, 0), float(jnp.sum(q * k)), rtol=1e-6)


def test_rotation_of_bfloat16_is_computed_in_float32():
    x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
    turns = rotary_turns(jnp.asarray([[1000]]), 4, 1e4)
    exact = rotate(x.astype(jnp.float32), turns)
    assert rotate(x, turns).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(rotate(x, turns), np.float32), exact, rtol=2**-8)
