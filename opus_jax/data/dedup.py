"""Duplicates: exact copies anywhere, and near copies of held-out text.

A near copy is found by containment of word 13-grams: the share of a document's 13-grams that also occur in the
held-out documents. Texts are compared without case, white space and punctuation; in scripts written without spaces
every character counts as a word.

Everything is arithmetic on arrays of 64-bit hashes, over blocks of a few megabytes of text at a time. With P the
prefix sums of byte * R^position modulo 2^64, the word from byte a to byte b hashes to (P[b] - P[a]) * R^-a, whatever
its position, and thirteen words hash to the sum of their mixed hashes times powers of a second odd constant.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt64

from opus_jax.data.blocks import blocks

NGRAM_WORDS = 13
NEAR_COPY_SHARE = 0.5  # a document with a larger containment is a near copy

_BASE = 0x9E3779B97F4A7C15  # any odd number has an inverse modulo 2^64
_BASE_INVERSE = pow(_BASE, -1, 1 << 64)
_ORDER = 0xD1B54A32D192ED03

_WORD_BYTE = np.array([chr(b).isalnum() if b < 128 else True for b in range(256)])
_UNSPACED_LEAD = np.arange(256) >= 0xE3  # first UTF-8 byte of U+3000 and beyond: a word by itself


class ExactCopies:
    """Remembers every text it has been shown, as 64-bit hashes."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """True the first time that a text (up to surrounding white space) is shown."""
        key = text_key(text)
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def text_key(text: str) -> bytes:
    """64 bits that stand for a text, up to surrounding white space."""
    return hashlib.blake2b(text.strip().encode(), digest_size=8).digest()


class HeldOutText:
    """The 13-grams of texts that others must not contain: 8 bytes of memory per held-out word."""

    def __init__(self, texts: Iterable[str]):
        hashes = [np.unique(ngram_hashes(block)[0]) for block in blocks(texts, len)]
        self._sorted = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))

    def containment(self, texts: Sequence[str]) -> Float64[np.ndarray, " documents"]:
        """Share of each text's 13-grams that occur in the held-out texts; 0 for a text without words."""
        grams, owner = ngram_hashes(texts)
        hits = np.bincount(owner[self._holds(grams)], minlength=len(texts))
        return hits / np.maximum(np.bincount(owner, minlength=len(texts)), 1)

    def _holds(self, grams: UInt64[np.ndarray, " grams"]) -> Bool[np.ndarray, " grams"]:
        if self._sorted.size == 0:
            return np.zeros(grams.shape, bool)
        place = np.minimum(np.searchsorted(self._sorted, grams), self._sorted.size - 1)
        return self._sorted[place] == grams


def ngram_hashes(texts: Sequence[str]) -> tuple[UInt64[np.ndarray, " grams"], Int64[np.ndarray, " grams"]]:
    """Hashes of the word 13-grams of `texts`, and the index of the text each belongs to.

    A text of fewer than 13 words has one gram, made of all its words.
    """
    words, owner = word_hashes(texts)
    counts = np.bincount(owner, minlength=len(texts))
    grams = np.zeros_like(words)
    for k in range(min(NGRAM_WORDS, words.size)):
        same_text = owner[k:] == owner[: words.size - k]
        factor = np.uint64(pow(_ORDER, k, 1 << 64))
        grams[: words.size - k] += np.where(same_text, words[k:] * factor, np.uint64(0))
    position = np.arange(words.size) - (np.cumsum(counts) - counts)[owner]
    whole = (position + NGRAM_WORDS <= counts[owner]) | (position == 0)
    return grams[whole], owner[whole]


def word_hashes(texts: Sequence[str]) -> tuple[UInt64[np.ndarray, " words"], Int64[np.ndarray, " words"]]:
    """Hashes of the words of `texts`, in order, and the index of the text each belongs to."""
    encoded = [text.lower().encode() + b"\n" for text in texts]
    raw = np.frombuffer(b"".join(encoded), np.uint8)
    starts, ends = _word_bounds(raw)
    powers, inverses = _power_tables(max(raw.size, 1))
    prefix = np.zeros(raw.size + 1, np.uint64)
    np.cumsum((raw + np.uint64(1)) * powers[: raw.size], out=prefix[1:])
    hashes = mix((prefix[ends] - prefix[starts]) * inverses[starts])
    text_ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    return hashes, np.searchsorted(text_ends, starts, side="right")


def _word_bounds(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and where they end (exclusive)."""
    word = _WORD_BYTE[raw]
    dash_or_quote = np.flatnonzero((raw[:-2] == 0xE2) & (raw[1:-1] == 0x80))  # U+2000 to U+203F
    for k in range(3):
        word[dash_or_quote + k] = False
    before = np.concatenate([[False], word[:-1]])
    starts = np.flatnonzero(word & (~before | _UNSPACED_LEAD[raw]))
    stops = np.flatnonzero(~word & before)
    run = np.searchsorted(stops, starts, side="right")
    ends = np.minimum(stops[run], np.append(starts[1:], raw.size)) if starts.size else starts
    return starts, ends


@functools.cache
def _tables_up_to(size: int) -> tuple[np.ndarray, np.ndarray]:
    def powers(base: int) -> np.ndarray:
        factors = np.full(size, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors)

    return powers(_BASE), powers(_BASE_INVERSE)


def _power_tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    return _tables_up_to(1 << (size - 1).bit_length())


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: spreads every bit of a hash over all 64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
