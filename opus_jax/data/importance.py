"""DSIR: choose training documents once, before training, by hashed n-gram importance (arXiv 2302.03169).

Words and pairs of words are hashed into buckets. With p their distribution in the target documents and q that in all
training documents, both smoothed, the log weight of a text is the sum over its n-grams of log(p / q); the largest
log weights plus Gumbel noise are a sample without replacement in proportion to the weights.

The paper's examples are all of one length. Documents are not, and the sum over a long one is far from 0 whatever it
says, so a document counts as the mean of its row-long parts.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64

from opus_jax.config import Config
from opus_jax.data.blocks import blocks
from opus_jax.data.dedup import mix, word_hashes
from opus_jax.data.documents_table import iterate_texts, read_columns
from opus_jax.data.plan import initial_plan
from opus_jax.data.proxy_rows import proxy_plan, proxy_row_indices
from opus_jax.data.records import Manifest, RowReader
from opus_jax.errors import UserError

BUCKETS = 10_000  # as in the paper
_ORDER = np.uint64(0xD1B54A32D192ED03)


def dsir_documents(
    records: str | Path, manifest: Manifest, config: Config, *, seed: int
) -> Float32[np.ndarray, " documents"]:
    """1 for the training documents that resemble the proxy's and are kept, 0 for all others.

    Kept are `plan.keep` of the bytes, and so, nearly, of the training rows, of the domains that the first plan offers.

    Args:
      seed: of the Gumbel noise.

    Raises:
      UserError: there are no proxy rows, or no word in them.
    """
    offered = np.flatnonzero(initial_plan(manifest, config).domain_weights)
    return resample(records, _proxy_documents(records, manifest, config), config.plan.keep, manifest, seed, offered)


def resample(
    records: str | Path,
    targets: Int[np.ndarray, " targets"],
    keep: float,
    manifest: Manifest,
    seed: int,
    offered: Int[np.ndarray, " offered"] | None = None,
) -> Float32[np.ndarray, " documents"]:
    """As `dsir_documents`, towards the documents with the ids `targets`, from the domains `offered` (None = all)."""
    columns = read_columns(records, "split", "bytes")
    training, rows = np.array(columns["split"], dtype=object) == "train", manifest.total_rows("train")
    if offered is not None:
        training &= np.isin(read_columns(records, "domain_id")["domain_id"], offered)
        rows = sum(manifest.rows["train"][manifest.domains[domain]] for domain in offered)
    wanted = np.isin(np.arange(len(training)), targets)
    counts = _bucket_counts(records, np.stack([wanted, training]))
    if not counts[0].any():
        raise UserError(f"plan.importance = dsir: {wanted.sum()} proxy documents hold no word: give more proxy text")
    row_ngrams = int(counts[1].sum()) / max(rows, 1)
    log_weights = _log_weights(records, _log_ratio(*counts), row_ngrams)
    noisy = log_weights + np.random.Generator(np.random.PCG64(seed)).gumbel(size=len(log_weights))
    return _first_bytes(np.where(training, noisy, -np.inf), np.array(columns["bytes"]) * training, keep)


def _proxy_documents(records: str | Path, manifest: Manifest, config: Config) -> Int64[np.ndarray, " targets"]:
    """Ids of the documents in the rows that the proxy is drawn from."""
    rows = proxy_row_indices(proxy_plan(manifest, config))
    documents = RowReader(records, "proxy").row_documents[rows]
    return np.unique(documents[documents >= 0])


def _bucket_counts(records: str | Path, member: np.ndarray) -> Int64[np.ndarray, "sets buckets"]:
    """N-grams by bucket, over the documents of each set: `member` is bool[sets, documents]."""
    totals = np.zeros((len(member), BUCKETS), np.int64)
    for first, _, buckets, owner in _ngram_blocks(records):
        for total, inside in zip(totals, member, strict=True):
            total += np.bincount(buckets[inside[first + owner]], minlength=BUCKETS)
    return totals


def _log_ratio(target: np.ndarray, everything: np.ndarray) -> Float64[np.ndarray, " buckets"]:
    """log(p / q), each count raised by 1: a bucket that a small target happens to lack is not forbidden."""
    p, q = ((counts + 1) / (counts.sum() + BUCKETS) for counts in (target, everything))
    return np.log(p / q)


def _log_weights(
    records: str | Path, log_ratio: Float64[np.ndarray, " buckets"], row_ngrams: float
) -> Float64[np.ndarray, " documents"]:
    parts = []
    for _, documents, buckets, owner in _ngram_blocks(records):
        sums = np.bincount(owner, log_ratio[buckets], minlength=documents)
        parts.append(sums * np.minimum(1, row_ngrams / np.maximum(np.bincount(owner, minlength=documents), 1)))
    return np.concatenate(parts) if parts else np.zeros(0)


def _ngram_blocks(records: str | Path) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """For blocks of documents: first id, how many, the bucket of every n-gram, and the place of its document."""
    first = 0
    for texts in blocks(iterate_texts(records), len):
        words, owner = word_hashes(texts)
        inside = owner[:-1] == owner[1:]
        pairs = mix(words[:-1] + words[1:] * _ORDER)[inside]
        buckets = np.concatenate([words, pairs]) % np.uint64(BUCKETS)
        yield first, len(texts), buckets.astype(np.int64), np.concatenate([owner, owner[:-1][inside]])
        first += len(texts)


def _first_bytes(order: np.ndarray, sizes: np.ndarray, share: float) -> Float32[np.ndarray, " documents"]:
    """1 for the documents of the largest `order` that together come nearest to `share` of all bytes; at least one."""
    ranked = np.argsort(-order, kind="stable")
    cumulative = np.cumsum(sizes[ranked])
    count = int(np.abs(cumulative - share * cumulative[-1]).argmin()) + 1
    kept = np.zeros(len(order), np.float32)
    kept[ranked[:count]] = 1
    return np.where(np.isneginf(order), 0, kept).astype(np.float32)
