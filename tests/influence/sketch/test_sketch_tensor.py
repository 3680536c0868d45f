import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.errors import UserError
from opus_jax.influence.sketch import CountSketch, TensorSketch
from tests.influence.sketch.sketched import assert_right_on_average, drawn, products

PAIR = np.stack([drawn(0, 16, 24), 0.5 * drawn(0, 16, 24) + drawn(1, 16, 24)])
EXACT = np.sum(PAIR[0] * PAIR[1])


@pytest.fixture(scope="module")
def inner():
    return products(TensorSketch(32), PAIR, 3000)


def test_inner_products_are_right_on_average(inner):
    assert_right_on_average(inner, EXACT)


def test_is_close_to_a_count_sketch_of_the_same_width(inner):
    counted = products(CountSketch(32, "hash"), PAIR, 3000)
    assert 0.8 < inner.var() / counted.var() < 1.6


@pytest.mark.parametrize("m", [40, 41])
def test_an_entry_goes_to_the_sum_of_its_rows_and_its_columns_place(m):
    units = jnp.eye(12 * 14).reshape(-1, 12, 14)
    found = np.asarray(TensorSketch(m).of_gradient(units, jnp.uint32(7))).reshape(12, 14, m)
    place, size = np.abs(found).argmax(axis=-1), np.abs(found).max(axis=-1)
    np.testing.assert_allclose(size, 1, atol=1e-5)
    np.testing.assert_allclose(np.abs(found).sum(axis=-1), 1, atol=1e-4)
    np.testing.assert_array_equal((place + place[0, 0]) % m, (place[:, :1] + place[:1]) % m)
    sign = np.sign(np.take_along_axis(found, place[..., None], -1)[..., 0])
    np.testing.assert_array_equal(sign * sign[0, 0], sign[:, :1] * sign[:1])
    assert len(np.unique(place)) > m / 2


def test_tokens_taken_a_few_at_a_time_are_the_same(monkeypatch):
    gradient = jnp.asarray(drawn(3, 2, 16, 24), jnp.float32)
    whole = TensorSketch(33).of_gradient(gradient, jnp.uint32(1))
    monkeypatch.setattr("opus_jax.influence.sketch.tensor.SPECTRA_BYTES", 2 * 2 * 33 * 8 * 5)  # five tokens of 16
    parts = TensorSketch(33).of_gradient(gradient, jnp.uint32(1))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="m = 0: must be at least 1"):
        TensorSketch(0)
