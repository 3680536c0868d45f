import numpy as np
import pytest

from opus_jax.data.permutation import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_place_comes_exactly_once(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


def test_places_are_found_one_at_a_time():
    whole = permute(np.arange(300), 300, 1, 2)
    assert [int(permute(np.array([i]), 300, 1, 2)[0]) for i in range(0, 300, 37)] == whole[::37].tolist()


def test_sizes_beyond_32_bits():
    size = 10**13 + 1
    out = permute(np.arange(1000), size, 3)
    assert len(set(out.tolist())) == 1000
    assert out.min() >= 0
    assert out.max() < size
    assert 0.4 < out.mean() / size < 0.6


def test_the_order_looks_random_and_differs_by_key():
    size = 2000
    first, second = permute(np.arange(size), size, 0, 1), permute(np.arange(size), size, 0, 2)
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.08
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.08


def test_the_order_is_for_ever():
    """Runs resume across versions of every library: these numbers must not change."""
    assert permute(np.arange(8), 8, 0, 0, 0, 0).tolist() == GOLDEN


GOLDEN = [4, 0, 3, 2, 5, 7, 1, 6]
