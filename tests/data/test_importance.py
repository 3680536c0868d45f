"""DSIR keeps the documents that read like the targets."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import prepare_small, small_config

from opus_jax.data import importance
from opus_jax.data.documents_table import read_columns
from opus_jax.data.importance import dsir_documents, resample
from opus_jax.data.plan import advance, initial_plan, rows_at
from opus_jax.data.records import Manifest, RowReader
from opus_jax.errors import UserError

KINDS = {
    "sea": ["wave", "harbour", "sailor", "anchor", "salt", "the", "and"],
    "law": ["court", "verdict", "appeal", "bench", "oath", "the", "and"],
}


def write_table(folder, rows):
    """(split, kind, words) for each document; returns a manifest of as many training rows as 20 words fill."""
    texts = [" ".join(random.Random(i).choices(KINDS[kind], k=words)) for i, (_, kind, words) in enumerate(rows)]
    table = {"split": [split for split, _, _ in rows], "text": texts, "bytes": [len(text) for text in texts]}
    pq.write_table(pa.table(table), folder / "documents.parquet")
    manifest = object.__new__(Manifest)
    words = sum(words for split, _, words in rows if split == "train")
    object.__setattr__(manifest, "rows", {"train": {"all": words // 20}})
    return manifest


def test_documents_like_the_targets_are_kept(tmp_path):
    rows = [("proxy", "sea", 100), ("proxy", "law", 100)] + [("train", kind, 100) for _ in range(20) for kind in KINDS]
    manifest = write_table(tmp_path, rows)
    kinds = np.array([kind for _, kind, _ in rows])
    for target, kind in enumerate(KINDS):
        kept = resample(tmp_path, np.array([target]), 0.5, manifest, 0)
        assert kept.dtype == np.float32
        assert np.array_equal(kept[2:], kinds[2:] == kind)
        assert (kept[:2] == 0).all()


@pytest.mark.parametrize("keep", [0.1, 0.3, 1.0])
def test_the_kept_documents_hold_the_share_asked_for(tmp_path, keep):
    rows = [("proxy", "sea", 50)] + [("train", "law", 20 + 7 * (i % 9)) for i in range(200)]
    manifest = write_table(tmp_path, rows)
    kept = resample(tmp_path, np.array([0]), keep, manifest, 0)
    sizes = np.array(read_columns(tmp_path, "bytes")["bytes"])[1:]
    assert sizes[kept[1:] == 1].sum() / sizes.sum() == pytest.approx(keep, abs=0.01)


def test_length_alone_decides_nothing(tmp_path):
    """Without it, a long text unlike the target weighs less than any short one, and a long one like it more."""
    rows = [("proxy", "sea", 200)] + [
        ("train", kind, words) for kind in KINDS for words in (20, 2000) for _ in range(10)
    ]
    manifest = write_table(tmp_path, rows)
    counts = importance._bucket_counts(tmp_path, np.array([[i == 0 for i in range(41)], [i > 0 for i in range(41)]]))
    weights = importance._log_weights(tmp_path, importance._log_ratio(*counts), 39.0)[1:].reshape(2, 2, 10).mean(2)
    assert manifest.total_rows("train") == 2020
    assert weights[0].min() > weights[1].max()
    assert abs(weights[:, 0] - weights[:, 1]).max() < 0.2 * abs(weights[0] - weights[1]).min()


def test_the_sample_follows_the_seed_and_the_weights(tmp_path):
    rows = [("proxy", "sea", 30)] + [("train", "sea", 20) for _ in range(60)]
    manifest = write_table(tmp_path, rows)
    first, again, other = (resample(tmp_path, np.array([0]), 0.5, manifest, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_log_ratio_is_finite_and_signed():
    ratio = importance._log_ratio(np.bincount([1, 1, 1], minlength=10), np.bincount([1, 2, 2, 2], minlength=10))
    assert np.isfinite(ratio).all()
    assert ratio[1] > 0 > ratio[2]
    assert importance._log_ratio(np.full(10, 5), np.full(10, 5)) == pytest.approx(0)


def test_targets_without_words_are_refused(tmp_path):
    manifest = write_table(tmp_path, [("proxy", "sea", 0), ("train", "sea", 50)])
    for targets in ([0], []):
        with pytest.raises(UserError, match=r"plan.importance = dsir: \d proxy documents hold no word"):
            resample(tmp_path, np.array(targets, int), 0.5, manifest, 0)


def test_a_plan_made_from_it_offers_kept_documents_only(tmp_path):
    settings = {"plan": {"importance": "dsir", "keep": 0.4}, "proxy": {"domains": ["code"]}}
    folder, config = prepare_small(tmp_path, **settings), small_config(tmp_path, **settings)
    manifest, reader = Manifest.load(folder), RowReader(folder, "train")
    kept = dsir_documents(folder, manifest, config, seed=0)
    columns = read_columns(folder, "split", "domain_id", "bytes")
    training = np.array(columns["split"]) == "train"
    code = np.array(columns["domain_id"]) == manifest.domains.index("code")
    assert not kept[~training].any()
    assert (kept * columns["bytes"])[training].sum() / np.array(columns["bytes"])[training].sum() == pytest.approx(
        0.4, abs=0.02
    )
    assert kept[training & code].mean() > kept[training & ~code].mean() + 0.2, "every text begins with its domain"
    targets = np.flatnonzero((np.array(columns["split"]) == "proxy") & code)
    assert np.array_equal(kept, resample(folder, targets, 0.4, manifest, 0))
    plan = advance(initial_plan(manifest, config), 0, priorities=kept, row_documents=reader.row_documents)
    for row in rows_at(plan, 0, 0, 200):
        documents = reader.row_documents[row]
        assert kept[documents[documents >= 0]].any()


def test_only_domains_on_offer_are_kept(tmp_path):
    """What `corpus.weights` leaves out must not use up what may be kept."""
    settings = {"plan": {"importance": "dsir", "keep": 0.5}, "corpus": {"weights": {"code": 1.0, "tables": 1.0}}}
    folder, config = prepare_small(tmp_path, **settings), small_config(tmp_path, **settings)
    manifest = Manifest.load(folder)
    kept = dsir_documents(folder, manifest, config, seed=0)
    domains = np.array(read_columns(folder, "domain_id")["domain_id"])
    assert set(np.array(manifest.domains)[domains[kept > 0]]) <= {"code", "tables"}
    assert kept.sum() > 0
