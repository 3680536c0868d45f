"""Clusters find kinds of text that nobody named, the same ones each time, and are kept beside the records."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import prepare_small

from opus_jax.data import clusters
from opus_jax.data.clusters import document_clusters, label_clusters, spherical_kmeans
from opus_jax.data.documents_table import read_columns
from opus_jax.errors import ConfigError

TOPICS = {
    "sea": ["wave", "harbour", "sailor", "anchor", "salt", "the", "and", "of"],
    "law": ["statute", "court", "plaintiff", "verdict", "appeal", "the", "and", "of"],
    "code": ["return", "lambda", "import", "class", "yield", "the", "and", "of"],
}


def topic_text(topic: str, seed: int) -> str:
    return " ".join(random.Random(f"{topic}{seed}").choices(TOPICS[topic], k=60))


@pytest.fixture
def records(tmp_path):
    """A records folder of one table: three topics in turn, every fifth document held out."""
    topics = [topic for _ in range(30) for topic in TOPICS]
    table = {
        "split": ["validation" if i % 5 == 0 else "train" for i in range(len(topics))],
        "text": [topic_text(topic, i) for i, topic in enumerate(topics)],
    }
    folder = tmp_path / "records" / "corpus-1"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "documents.parquet")
    return folder


def blobs(centres: int, each: int, spread: float, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(1)
    middle = np.eye(width)[:centres]
    rows = np.repeat(middle, each, 0) + spread * dice.normal(size=(centres * each, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), np.repeat(np.arange(centres), each)


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


def test_separate_groups_are_found():
    rows, truth = blobs(6, 40, 0.05)
    assert same_partition(spherical_kmeans(rows, 6), truth)
    dice = np.random.default_rng(2).permutation(len(rows))
    assert same_partition(spherical_kmeans(rows[dice], 6), truth[dice])


def test_groups_are_found_from_a_sample(monkeypatch):
    monkeypatch.setattr(clusters, "SAMPLE", 1)
    rows, truth = blobs(3, 1000, 0.05)
    sizes = []
    first = clusters._first_centres
    monkeypatch.setattr(clusters, "_first_centres", lambda sample, k: (sizes.append(len(sample)), first(sample, k))[1])
    assert same_partition(spherical_kmeans(rows, 3), truth)
    assert sizes == [768]


def test_every_cluster_has_rows_and_few_different_rows_give_few():
    rows, _ = blobs(4, 25, 0.5)
    found = spherical_kmeans(rows, 20)
    assert set(found) == set(range(found.max() + 1))
    assert 10 < found.max() + 1 <= 20
    assert set(spherical_kmeans(rows[:3], 20)) == {0, 1, 2}
    assert set(spherical_kmeans(np.repeat(rows[:2], 5, 0), 20)) == {0, 1}
    assert spherical_kmeans(np.zeros((4, 8), np.float32), 3).max() <= 2


def test_documents_are_clustered_by_topic(records):
    found, labels = document_clusters(records, 3, progress=False)
    split = np.array(read_columns(records, "split")["split"])
    assert found.dtype == np.int32
    assert (found[split != "train"] == -1).all()
    topics = np.tile(np.arange(3), 30)
    assert same_partition(found[split == "train"], topics[split == "train"])
    for cluster, label in enumerate(labels):
        topic = list(TOPICS)[topics[found == cluster][0]]
        assert set(label.split()) < set(TOPICS[topic]) - {"the", "and", "of"}


def test_the_result_is_kept_beside_the_records(records, monkeypatch):
    before = sorted(records.iterdir())
    made = document_clusters(records, 3, progress=False)
    assert sorted(records.iterdir()) == before
    other = document_clusters(records, 2, progress=False)
    assert len(other[1]) == 2
    files = sorted(records.parent.glob("corpus-1.clusters-*.npz"))
    assert len(files) == 2
    assert len(list(records.parent.iterdir())) == 3, "nothing half written is left"

    monkeypatch.setattr(clusters, "_embed", lambda *_: pytest.fail("clustered again"))
    again = document_clusters(records, 3, progress=False)
    assert np.array_equal(again[0], made[0])
    assert again[1] == made[1]


@pytest.mark.parametrize("key", ["VERSION", "embedder", "embedding.VERSION"])
def test_whatever_decides_the_clusters_names_the_file(records, monkeypatch, key):
    before = clusters._cache_file(records, 3, "hashing")
    if key == "embedder":
        assert clusters._cache_file(records, 3, "a:b") != before
    else:
        owner = clusters if key == "VERSION" else clusters.embedding
        monkeypatch.setattr(owner, "VERSION", -1)
        assert clusters._cache_file(records, 3, "hashing") != before


def test_a_damaged_file_is_made_again(records):
    made = document_clusters(records, 3, progress=False)
    (file,) = records.parent.glob("*.npz")
    whole = file.read_bytes()
    for damage in (b"", whole[:100], b"not an archive"):
        file.write_bytes(damage)
        assert np.array_equal(document_clusters(records, 3, progress=False)[0], made[0])
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_said_and_no_more(records, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(clusters.tempfile, "NamedTemporaryFile", refuse)
    assert document_clusters(records, 3, progress=False)[0].max() == 2
    assert "is not kept (Read-only file system)" in caplog.text


def test_an_unknown_embedder_is_refused(records):
    with pytest.raises(ConfigError, match=r"proxy.embedder = 'absent:f'"):
        document_clusters(records, 3, "absent:f", progress=False)


def test_a_label_prefers_words_of_many_documents_here_and_few_elsewhere():
    texts = ["the wide sea once", "the sea wide", "the sea", "the town", "town the", "the town is far"]
    assert label_clusters(texts, np.array([0, 0, 0, 1, 1, 1], np.int32)) == ["sea wide the", "town the"]
    assert label_clusters([], np.zeros(0, np.int32)) == []


def test_a_prepared_corpus_is_clustered(tmp_path):
    folder = prepare_small(tmp_path)
    found, labels = document_clusters(folder, 5, progress=False)
    split = np.array(read_columns(folder, "split")["split"])
    assert ((found >= 0) == (split == "train")).all()
    assert len(labels) == found.max() + 1 == 5
    assert prepare_small(tmp_path) == folder
