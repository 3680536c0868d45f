import numpy as np
import pytest

from opus_jax.errors import UserError
from opus_jax.influence.sketch import KronSketch
from tests.influence.sketch.sketched import assert_right_on_average, drawn, products


def two_token_gradients():
    """x and y = x / 2 + noise, [96, 128], of two tokens each: few tokens are what shared sides do worst on."""
    x = drawn(0, 96, 2) @ drawn(1, 2, 128)
    return np.stack([x, 0.5 * x + drawn(2, 96, 2) @ drawn(3, 2, 128)])


PAIR = two_token_gradients()
EXACT = np.sum(PAIR[0] * PAIR[1])


@pytest.fixture(scope="module")
def inner():
    """{(blocks, side): inner products under 600 seeds}."""
    return {size: products(KronSketch(*size), PAIR, 600) for size in [(1, 16), (4, 16), (4, 32), (1, 64)]}


def test_inner_products_are_right_on_average(inner):
    for found in inner.values():
        assert_right_on_average(found, EXACT)


def test_the_variance_falls_with_the_number_of_blocks(inner):
    assert inner[1, 16].var() / inner[4, 16].var() == pytest.approx(4, rel=0.4)


def test_four_small_blocks_beat_one_large(inner):
    assert KronSketch(4, 32).width == KronSketch(1, 64).width
    assert inner[4, 32].var() < 0.75 * inner[1, 64].var()


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (8, 8)])
def test_what_fits_is_kept_whole(shape):
    pair = drawn(2, 2, *shape)
    np.testing.assert_allclose(products(KronSketch(4, 4), pair, 3), np.sum(pair[0] * pair[1]), rtol=1e-5)


@pytest.mark.parametrize("settings", [(0, 8), (4, 0)])
def test_bad_settings_are_named(settings):
    with pytest.raises(UserError, match="= 0: must be at least 1"):
        KronSketch(*settings)
