"""Which domain a slot of the candidate stream belongs to, in exact proportions and without memory.

Slot s is the point s * p mod 2^32 of a golden-ratio lattice, and domain g owns the interval of points between its
cumulative weights. Any run of consecutive slots therefore holds each domain in nearly exact proportion (the
three-distance theorem), and the slots of a domain before slot s are counted in closed form.
"""

import numpy as np
from jaxtyping import Float, Int

MODULUS = 1 << 32
STRIDE = 2654435769  # the odd number nearest to 2^32 / golden ratio


def boundaries(weights: Float[np.ndarray, " G"]) -> Int[np.ndarray, " bounds"]:
    """int64[G + 1]: domain g owns the points boundaries[g] <= x < boundaries[g + 1]."""
    cumulative = np.cumsum(weights)
    return np.concatenate([[0], np.round(cumulative / cumulative[-1] * MODULUS)]).astype(np.int64)


def domain_of(slots: Int[np.ndarray, " P"], bounds: Int[np.ndarray, " bounds"]) -> Int[np.ndarray, " P"]:
    """int64[P]: the domain of every slot."""
    points = slots.astype(np.uint64) * np.uint64(STRIDE) % np.uint64(MODULUS)
    return np.searchsorted(bounds, points.astype(np.int64), side="right") - 1


def count_before(slot: int, bounds: Int[np.ndarray, " bounds"]) -> Int[np.ndarray, " G"]:
    """int64[G]: how many of the slots 0 .. slot - 1 each domain has."""
    below = [_points_below(slot, int(bound)) for bound in bounds]
    return np.diff(np.array(below, np.int64))


def _points_below(slots: int, bound: int) -> int:
    """How many s in 0 .. slots - 1 have (s * STRIDE mod MODULUS) < bound.

    [x mod m < c] = floor(x / m) - floor((x - c) / m), summed; x - c is lifted by m to stay above 0.
    """
    if bound in (0, MODULUS):
        return slots if bound else 0
    shifted = floor_sum(slots, MODULUS, STRIDE, MODULUS - bound) - slots
    return floor_sum(slots, MODULUS, STRIDE, 0) - shifted


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum over i in 0 .. n - 1 of floor((a i + b) / m), for n, a, b >= 0, in O(log m) steps."""
    total = 0
    while n > 0:
        total += (a // m) * n * (n - 1) // 2 + (b // m) * n
        a, b = a % m, b % m
        top = a * n + b
        n, b = divmod(top, m)
        m, a = a, m
    return total
