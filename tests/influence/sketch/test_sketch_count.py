import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.errors import UserError
from opus_jax.influence.sketch import CountSketch
from pallas_kernels.count_sketch.folding import fold_shape
from tests.influence.sketch.sketched import assert_right_on_average, drawn, products

PAIR = np.stack([drawn(0, 12, 20), 0.5 * drawn(0, 12, 20) + drawn(1, 12, 20)])
EXACT = np.sum(PAIR[0] * PAIR[1])
M = 32


@pytest.fixture(scope="module", params=["stride", "hash"])
def found(request):
    """(form, inner products under 4000 seeds)."""
    return request.param, products(CountSketch(M, request.param), PAIR, 4000)


def test_inner_products_are_right_on_average(found):
    assert_right_on_average(found[1], EXACT)


def variance(form):
    """Of hashed buckets, the known formula; of fixed ones, its sum over the pairs that share one."""
    x, y = PAIR.reshape(2, -1)
    if form == "hash":
        return (x @ x * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / M
    rows, columns = fold_shape(12, 20, M)
    place = (np.arange(12)[:, None] % rows * columns + np.arange(20) % columns).ravel()
    share = (place[:, None] == place) & ~np.eye(240, dtype=bool)
    return np.sum(share * (np.outer(x**2, y**2) + np.outer(x * y, x * y)))


def test_the_variance_is_that_of_the_colliding_pairs(found):
    form, inner = found
    assert inner.var() == pytest.approx(variance(form), rel=0.12)


def test_without_structure_a_stride_is_as_good_as_a_hash():
    assert variance("stride") == pytest.approx(variance("hash"), rel=0.25)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (5, 6), (10, 3)])
def test_a_matrix_that_fits_is_kept_whole(shape):
    pair = drawn(2, 2, *shape)
    np.testing.assert_allclose(products(CountSketch(M), pair, 3), np.sum(pair[0] * pair[1]), rtol=1e-5)


def test_narrow_gradients_are_summed_in_float32():
    ones = jnp.ones((1, 64, 64), jnp.bfloat16)
    found = CountSketch(4).of_gradient(ones, jnp.uint32(0))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.round(found))
    assert np.abs(found).max() > 8


@pytest.mark.parametrize(
    ("settings", "message"), [((0,), "m = 0: must be at least 1"), ((8, "nest"), "'nest': must be")]
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        CountSketch(*settings)
