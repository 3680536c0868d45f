import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opus_jax.data.lattice import MODULUS, boundaries, count_before, domain_of, floor_sum

SMALL = st.integers(0, 200)
WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3).map(np.array)


@given(n=SMALL, m=st.integers(1, 200), a=SMALL, b=SMALL)
def test_floor_sum_is_the_sum(n, m, a, b):
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@given(weights=WEIGHTS, slots=st.integers(0, 500))
def test_counts_in_closed_form_are_those_of_the_slots(weights, slots):
    bounds = boundaries(weights)
    counted = np.bincount(domain_of(np.arange(slots), bounds), minlength=len(weights))
    assert np.array_equal(count_before(slots, bounds), counted)


@given(weights=WEIGHTS, start=st.integers(0, 2**45), length=st.integers(1, 2000))
def test_every_window_has_the_proportions_almost_exactly(weights, start, length):
    bounds = boundaries(weights)
    counts = np.bincount(domain_of(np.arange(start, start + length), bounds), minlength=len(weights))
    # Ostrowski: the discrepancy of a golden-ratio lattice grows with the logarithm of the window.
    assert np.abs(counts - length * weights / weights.sum()).max() <= 2 + np.log2(length)
    assert np.array_equal(counts, count_before(start + length, bounds) - count_before(start, bounds))


def test_domains_without_weight_own_no_point():
    bounds = boundaries(np.array([0.0, 1.0, 0.0, 2.0, 0.0]))
    assert bounds[0] == bounds[1] == 0
    assert bounds[2] == bounds[3]
    assert bounds[4] == bounds[5] == MODULUS
    assert set(domain_of(np.arange(5000), bounds).tolist()) == {1, 3}
