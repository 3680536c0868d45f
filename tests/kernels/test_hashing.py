import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.count_sketch.hashing import buckets, fold_seed, mix, signs

SEED = jnp.uint32(11)


def word(x):
    """The finaliser of MurmurHash3, in Python's own integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 16)


def test_mix_is_the_finaliser_in_plain_integers():
    numbers = [0, 1, 2, 77, 2**31, 2**32 - 1]
    assert [int(x) for x in mix(jnp.array(numbers, jnp.uint32))] == [word(x) for x in numbers]


def test_a_part_has_the_signs_and_buckets_of_the_whole():
    for function in (lambda *a: signs(*a[:2], *a[2:]), lambda *a: buckets(*a[:2], 50, *a[2:])):
        whole = function(12, 20, SEED)
        part = function(5, 7, SEED, (4, 9))
        np.testing.assert_array_equal(part, whole[4:9, 9:16])


def test_signs_of_two_seeds_and_of_neighbours_are_uncorrelated():
    first, second = (np.asarray(signs(200, 300, jnp.uint32(s)), float) for s in (0, 1))
    bound = 5 / np.sqrt(first.size)  # five standard deviations
    assert set(np.unique(first)) == {-1.0, 1.0}
    for product in (first, second, first * second, first[1:] * first[:-1], first[:, 1:] * first[:, :-1]):
        assert abs(product.mean()) < bound
    quadruples = first[0::2, 0::2] * first[1::2, 0::2] * first[0::2, 1::2] * first[1::2, 1::2]
    assert abs(quadruples.mean()) < 5 / np.sqrt(quadruples.size)


def test_signs_are_independent_over_seeds_too():
    """Rectangles of a matrix, the pattern that a product of row and column signs would fail on."""
    all_seeds = np.asarray(jax.vmap(lambda s: signs(4, 4, s))(jnp.arange(4000, dtype=jnp.uint32)), float)
    for product in (all_seeds[:, 0, 0], all_seeds[:, 0, 1] * all_seeds[:, 3, 2]):
        assert abs(product.mean()) < 5 / np.sqrt(4000)
    rectangle = all_seeds[:, 0, 0] * all_seeds[:, 0, 1] * all_seeds[:, 1, 0] * all_seeds[:, 1, 1]
    assert abs(rectangle.mean()) < 5 / np.sqrt(4000)


def test_buckets_are_even():
    counts = np.bincount(np.asarray(buckets(300, 400, 40, SEED)).reshape(-1), minlength=40)
    chi_square = np.sum((counts - 3000) ** 2 / 3000)
    assert chi_square < 39 + 5 * np.sqrt(2 * 39)


def test_seeds_of_all_leaves_and_layers_differ():
    numbers = [(leaf, layer) for leaf in range(12) for layer in range(12)]
    plain = [int(fold_seed(7, *pair)) for pair in numbers]
    assert len(set(plain)) == len(plain)
    traced = jax.jit(jax.vmap(lambda leaf, layer: fold_seed(jnp.uint32(7), leaf, layer)))
    leaves, layers = (jnp.array(x, jnp.uint32) for x in zip(*numbers, strict=True))
    assert [int(x) for x in traced(leaves, layers)] == plain


@pytest.mark.parametrize("number", [0, -1, 2**31, 2**32 - 1])
def test_any_integer_is_a_number(number):
    assert fold_seed(number, number).dtype == jnp.uint32
    assert int(fold_seed(3, number)) == int(fold_seed(3, jnp.uint32(number % 2**32)))
