import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.influence.sketch import count_sketch, random_signs

M = 16


def gradients(seed=0, rows=3):
    """Three leaves: two stacked kernels (2 matrices of 40), one matrix of 5 x 9, and a vector of 7."""
    draw = np.random.default_rng(seed)
    shapes = {"stacked": (2, 5, 8), "matrix": (5, 9), "vector": (7,)}
    return {name: jnp.asarray(draw.normal(size=(rows, *shape)), jnp.float32) for name, shape in shapes.items()}


def matrices(tree):
    """The layer matrices of each row, in the order of the leaves: lists of [N, entries]."""
    stacked = [tree["stacked"][:, layer] for layer in range(2)]
    return [np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in (tree["matrix"], *stacked, tree["vector"])]


def sketches(tree, seed):
    return count_sketch(tree, M, jax.random.key(seed))


def test_one_sketch_for_each_matrix_of_a_stack():
    assert sketches(gradients(), 0).shape == (3, 4, M)


def test_is_a_signed_sum_over_strides():
    tree, key = gradients(), jax.random.key(3)
    signs = random_signs(jax.tree.map(lambda g: g[0], tree), key)
    assert set(np.unique(np.concatenate([np.ravel(s) for s in jax.tree.leaves(signs)]))) == {-1, 1}
    signed = matrices(jax.tree.map(lambda g, s: g * s, tree, signs))
    for layer, entries in enumerate(signed):
        expected = np.zeros((3, M))
        np.add.at(expected, (slice(None), np.arange(entries.shape[1]) % M), entries)
        np.testing.assert_allclose(count_sketch(tree, M, key)[:, layer], expected, rtol=1e-5, atol=1e-5)


def test_is_linear_and_the_same_for_the_same_key():
    a, b = gradients(0), gradients(1)
    both = jax.tree.map(lambda x, y: 2 * x - y, a, b)
    np.testing.assert_allclose(sketches(both, 0), 2 * sketches(a, 0) - sketches(b, 0), rtol=1e-4, atol=1e-4)
    assert np.abs(sketches(a, 0) - sketches(a, 1)).max() > 0.1


def test_layers_of_a_stack_have_signs_of_their_own():
    signs = random_signs({"stacked": jnp.zeros((2, 50, 50))}, jax.random.key(0))["stacked"].astype(jnp.float32)
    assert abs(float(jnp.mean(signs[0] * signs[1]))) < 0.1


@pytest.fixture(scope="module")
def products():
    """[4000 keys, layers]: inner products of two gradients' sketches, and the gradients' matrices."""
    tree = gradients(rows=2)
    draw = jax.jit(jax.vmap(lambda seed: jnp.sum(jnp.prod(sketches(tree, seed), axis=0), axis=-1)))
    return np.asarray(draw(jnp.arange(4000)), np.float64), matrices(tree)


def test_inner_products_are_right_on_average(products):
    drawn, layers = products
    exact = np.array([x[0] @ x[1] for x in layers])
    error = np.abs(drawn.mean(0) - exact)
    assert np.all(error < 4.5 * drawn.std(0) / 4000**0.5 + 1e-5)


def test_the_variance_is_that_of_the_colliding_pairs(products):
    """Sum over pairs p != q of one place of x_p^2 y_q^2 + x_p y_p x_q y_q; about the usual formula in general."""
    drawn, layers = products
    for layer, (x, y) in enumerate(layers):
        place = np.arange(x.size) % M
        collide = (place[:, None] == place) & ~np.eye(x.size, dtype=bool)
        exact = np.sum(collide * (np.outer(x**2, y**2) + np.outer(x * y, x * y)))
        assert drawn[:, layer].var() == pytest.approx(exact, rel=0.15, abs=1e-6)
    variance = lambda x, y: (x @ x * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / M  # noqa: E731
    usual = sum(variance(x, y) for x, y in layers[:3])
    assert drawn[:, :3].sum(1).var() == pytest.approx(usual, rel=0.5)


def test_a_matrix_that_fits_is_kept_whole(products):
    drawn, layers = products
    np.testing.assert_allclose(drawn[:, 3], layers[3][0] @ layers[3][1], rtol=1e-5)


def test_narrow_gradients_are_summed_in_float32():
    ones = {"w": jnp.ones((1, 64, 64), jnp.bfloat16)}
    found = count_sketch(ones, 4, jax.random.key(0))
    assert found.dtype == jnp.float32
    signs = np.asarray(random_signs({"w": ones["w"][0]}, jax.random.key(0))["w"]).reshape(-1, 4)
    np.testing.assert_array_equal(found[0, 0], signs.sum(0))
