"""Kinds of text that nobody named: clusters of the training documents by their embeddings.

Spherical k-means (Dhillon and Modha 2001): a document belongs to the centre with which its cosine, seen from the mean
of all documents, is largest, and a centre is the direction of the sum of its documents. Centres are found on a sample,
beginning with k-means++ (Arthur and Vassilvitskii 2007); then every document is assigned.
"""

import logging
import os
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, Int64

from opus_jax.config import fingerprint
from opus_jax.data import embedding
from opus_jax.data.blocks import blocks
from opus_jax.data.documents_table import iterate_texts, read_columns
from opus_jax.data.embedding import EMBEDDED_CHARACTERS, Embedder, centred, load_embedder
from opus_jax.data.permutation import permute
from opus_jax.data.progress import progress_bar

VERSION = 1  # of the clusters: what was written under another number is made anew
SEED = 0
ROUNDS = 25
SAMPLE = 1 << 15  # documents that decide the centres, or 256 for each where that is more
LABEL_WORDS = 4
_LABELLED = 200  # documents of a cluster that are read for its label
_WORD = re.compile(r"[^\W\d_]{3,24}(?:['’][^\W\d_]{1,3})?")


def document_clusters(
    records: str | Path, clusters: int, embedder_name: str = "hashing", progress: bool = True
) -> tuple[Int32[np.ndarray, " documents"], list[str]]:
    """The cluster of every training document, -1 for the others, and a label of some telling words for each cluster.

    There are fewer clusters than asked for where there are fewer (different) documents. The result is kept in a file
    beside the records folder; a folder and an embedder's name stand for what they hold.

    Raises:
      ConfigError: `proxy.embedder` cannot be used.
    """
    file = _cache_file(Path(records), clusters, embedder_name)
    known = _read(file)
    if known is not None:
        return known
    embedder = load_embedder(embedder_name)
    of_all = np.full(len(read_columns(records, "split")["split"]), -1, np.int32)
    training = _training_documents(records)
    with progress_bar(progress) as bar:
        texts = bar.track(iterate_texts(records, "train"), total=len(training), description="embedding documents")
        rows = _embed(texts, embedder)
        of_training = spherical_kmeans(centred(rows, rows.mean(0)), clusters) if len(rows) else np.zeros(0, np.int32)
        texts = bar.track(iterate_texts(records, "train"), total=len(training), description="naming clusters")
        labels = label_clusters(texts, of_training)
    of_all[training] = of_training
    _write(file, of_all, labels)
    return of_all, labels


def spherical_kmeans(rows: Float32[np.ndarray, "n D"], clusters: int) -> Int32[np.ndarray, " n"]:
    """The cluster of every row: 0 to at most `clusters` - 1, none of them empty. Deterministic; rows have norm 1."""
    size = min(len(rows), max(SAMPLE, 256 * clusters))
    sample = rows[np.sort(permute(np.arange(size), len(rows), SEED))]
    centres = _first_centres(sample, clusters)
    before = np.full(len(sample), -1)
    for _ in range(ROUNDS):
        nearest = (sample @ centres.T).argmax(1)
        if np.array_equal(nearest, before):
            break
        centres, before = _directions(sample, nearest, centres), nearest
    nearest = np.concatenate([(part @ centres.T).argmax(1) for part in _parts(rows)])
    return np.unique(nearest, return_inverse=True)[1].reshape(-1).astype(np.int32)


def _first_centres(rows: np.ndarray, clusters: int) -> np.ndarray:
    """k-means++: each next centre is a row, drawn in proportion to 1 - cosine with the nearest centre so far."""
    dice = np.random.Generator(np.random.PCG64(SEED))
    chosen = [int(dice.integers(len(rows)))]
    distance = np.full(len(rows), np.inf)
    while len(chosen) < clusters:
        distance = np.minimum(distance, 1 - rows @ rows[chosen[-1]])
        distance[distance < 1e-6] = 0  # a copy of a centre
        if not distance.any():
            break
        cumulative = np.cumsum(distance, dtype=np.float64)
        chosen.append(int(np.searchsorted(cumulative, dice.random() * cumulative[-1], side="right")))
    return rows[chosen]


def _directions(rows: np.ndarray, nearest: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The direction of each cluster's sum; a centre without rows stays where it is."""
    order = np.argsort(nearest, kind="stable")
    present, starts = np.unique(nearest[order], return_index=True)
    moved = centres.copy()
    sums = np.add.reduceat(rows[order], starts, axis=0)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    moved[present] = np.where(norms > 0, sums / np.where(norms > 0, norms, 1), centres[present])
    return moved


def label_clusters(texts: Iterable[str], of_documents: Int32[np.ndarray, " documents"]) -> list[str]:
    """A label for every cluster: words of many of its documents and of few others.

    With p the share of a cluster's documents that hold a word and q that of all documents, the words with the largest
    p log(p / q) are taken, from the first documents of each cluster.
    """
    count = int(of_documents.max(initial=-1)) + 1
    inside: list[Counter[str]] = [Counter() for _ in range(count)]
    read = np.zeros(count, np.int64)
    for cluster, text in zip(of_documents, texts, strict=True):
        if read[cluster] < _LABELLED:
            read[cluster] += 1
            inside[cluster].update(set(_WORD.findall(text[:EMBEDDED_CHARACTERS].lower())))
    return [_label(words, int(n), inside, read) for words, n in zip(inside, read, strict=True)]


def _label(
    words: Counter[str], documents: int, inside: list[Counter[str]], read: Int64[np.ndarray, " clusters"]
) -> str:
    """Every cluster counts alike in q, however many of its documents were read."""

    def telling(word: str) -> float:
        share = words[word] / documents
        overall = np.mean([other[word] / n for other, n in zip(inside, read, strict=True)])
        return float(share * np.log(share / overall))

    frequent = [word for word, n in words.most_common(500) if n > 1 or documents < 3]
    return " ".join(sorted(frequent, key=lambda word: (-telling(word), word))[:LABEL_WORDS])


def _training_documents(records: str | Path) -> np.ndarray:
    return np.flatnonzero(np.array(read_columns(records, "split")["split"], dtype=object) == "train")


def _embed(texts: Iterable[str], embedder: Embedder) -> np.ndarray:
    made = [embedder(block) for block in blocks(texts, lambda text: min(len(text), EMBEDDED_CHARACTERS))]
    return np.concatenate(made) if made else np.zeros((0, 1), np.float32)


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[first : first + SAMPLE] for first in range(0, len(rows), SAMPLE))


# ------------------------------------------------------------------------------------------ the file that keeps them


def _cache_file(records: Path, clusters: int, embedder_name: str) -> Path:
    mark = fingerprint(VERSION, embedding.VERSION, clusters, embedder_name)
    return records.with_name(f"{records.name}.clusters-{mark}.npz")


def _read(file: Path) -> tuple[np.ndarray, list[str]] | None:
    try:
        with np.load(file) as stored:
            return stored["clusters"], stored["labels"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, or cut off: made again


def _write(file: Path, clusters: np.ndarray, labels: list[str]) -> None:
    """Whole or not at all; several processes may write at once."""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as stream:
            np.savez(stream, clusters=clusters, labels=np.array(labels, dtype=str))
        os.replace(stream.name, file)
    except OSError as error:
        logging.getLogger("opus_jax").warning("%s is not kept (%s): the next run clusters again", file, error.strerror)
