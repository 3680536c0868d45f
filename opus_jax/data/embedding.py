"""Texts as vectors whose cosine says how alike they are: for retrieval and for clusters.

The built-in embedder needs neither training nor downloads. Words, pairs of words and character trigrams are counted,
and the logarithms of the counts are added, with a random sign each, at a hashed place of the vector (feature hashing,
Weinberger et al. 2009), so that inner products are, in expectation, those of the unhashed counts.
"""

import importlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from opus_jax.data.dedup import mix, word_hashes
from opus_jax.errors import ConfigError

Embedder = Callable[[Sequence[str]], Float32[np.ndarray, "n D"]]  # rows have norm 1; a text with nothing in it gives 0

VERSION = 1  # of the built-in embedder: what is cached under another number is made anew
EMBEDDED_CHARACTERS = 4096  # of the beginning of a text, whatever the embedder
_ORDER = np.uint64(0xD1B54A32D192ED03)
_WORDS, _PAIRS, _TRIGRAMS = 0.3, 0.3, 1.0  # weights: trigrams tell kinds of text best, words add what it is about


def hashing_embedder(dimension: int = 256) -> Embedder:
    """The built-in embedder: a pure function of the text, the same on every machine."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        words, owner = word_hashes(texts)
        inside = owner[:-1] == owner[1:]
        pairs = (words[:-1] + words[1:] * _ORDER)[inside]
        size = (len(texts), dimension)
        rows = _WORDS * _unit(_hashed_logs(words, owner, size))
        rows += _PAIRS * _unit(_hashed_logs(pairs, owner[:-1][inside], size))
        rows += _TRIGRAMS * _unit(_hashed_logs(*_trigrams(texts), size))
        return _unit(rows).astype(np.float32)

    return embed


def load_embedder(name: str, key: str = "proxy.embedder") -> Embedder:
    """The embedder of that name: `hashing`, or `package.module:function`, which is imported.

    Whatever its origin, it is given the first `EMBEDDED_CHARACTERS` of each text, and its rows are scaled to norm 1.

    Raises:
      ConfigError: naming `key`: there is no such function; or, when called, it does not give a row of finite numbers
        for each text.
    """
    function = hashing_embedder() if name == "hashing" else _imported(name, key)

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = np.asarray(function([text[:EMBEDDED_CHARACTERS] for text in texts]), np.float32)
        if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
            wanted = f"finite numbers of shape [{len(texts)}, D] for {len(texts)} texts"
            raise ConfigError(key, name, f"must give {wanted}; it gave {rows.shape}")
        return _unit(rows)

    return embed


def centred(rows: Float32[np.ndarray, "n D"], mean: Float32[np.ndarray, " D"]) -> Float32[np.ndarray, "n D"]:
    """Rows seen from `mean`, again of norm 1 (or 0, where a text has nothing in it).

    What all texts of a corpus have in common, such as its language, makes every cosine large; without it the nearest
    texts are of the same kind far more often.
    """
    return _unit(np.where(rows.any(1, keepdims=True), rows - mean, 0))


def _imported(name: str, key: str) -> Callable[[Sequence[str]], object]:
    module, separator, attribute = name.partition(":")
    if not (separator and module and attribute):
        raise ConfigError(key, name, "must be hashing or package.module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(key, name, f"cannot be imported ({error}): install it, or use hashing") from None
    if not callable(function):
        raise ConfigError(key, name, "must name a function from texts to an array [texts, D]")
    return function


def _hashed_logs(
    hashes: UInt64[np.ndarray, " features"], owner: Int64[np.ndarray, " features"], size: tuple[int, int]
) -> np.ndarray:
    """float64[texts, D]: the sum over the different features of a text of sign * log(1 + count)."""
    keys, counts = np.unique(owner.astype(np.uint64) << np.uint64(40) | hashes >> np.uint64(24), return_counts=True)
    feature = mix(keys & np.uint64((1 << 40) - 1))
    sign = np.where(feature >> np.uint64(63), -1.0, 1.0)
    place = (keys >> np.uint64(40)) * np.uint64(size[1]) + feature % np.uint64(size[1])
    return np.bincount(place.astype(np.int64), sign * np.log1p(counts), minlength=size[0] * size[1]).reshape(size)


def _trigrams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all three consecutive UTF-8 bytes of the lower-cased texts, and the index of the text of each."""
    encoded = [text.lower().encode() for text in texts]
    raw = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint64)
    owner = np.repeat(np.arange(len(texts)), [len(e) for e in encoded])
    if raw.size < 3:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    grams = raw[:-2] << np.uint64(16) | raw[1:-1] << np.uint64(8) | raw[2:]
    inside = owner[:-2] == owner[2:]
    return mix(grams[inside]), owner[:-2][inside]


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
