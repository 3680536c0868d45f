"""A keyed permutation of 0 .. n-1, evaluated at any place without storing or replaying anything.

A balanced Feistel network over the smallest even number of bits that holds n - 1, walked along its cycle until it
lands below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Written here, in plain integer
arithmetic, so that the order of a run never changes with the version of a library.
"""

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

_ROUNDS = 6


def permute(index: Int[np.ndarray, " P"], size: int, *key: int) -> Int[np.ndarray, " P"]:
    """int64[P]: the places to which the permutation of 0 .. size - 1 named by `key` takes `index`."""
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    keys = _round_keys(key)
    out = index.astype(np.uint64)
    walking = np.ones(out.shape, bool)
    while walking.any():
        out[walking] = _feistel(out[walking], half, keys)
        walking &= out >= size
    return out.astype(np.int64)


def _round_keys(key: tuple[int, ...]) -> UInt64[np.ndarray, " rounds"]:
    text = ",".join(str(int(k)) for k in key)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest(), "<u8")


def _feistel(x: UInt64[np.ndarray, " P"], half: np.uint64, keys: UInt64[np.ndarray, " rounds"]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014); multiplication wraps, as meant."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
