"""Training and proxy rows under one numbering."""

import numpy as np
import pytest
from small_corpus import prepare_small

from opus_jax.data.buffers import every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.data.joined_reader import WithProxyRows
from opus_jax.data.plan import Plan, fitted
from opus_jax.data.records import RowReader
from opus_jax.errors import UserError

ROWS = np.array([5, 0, 9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_small(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def parts(folder):
    return RowReader(folder, "train"), RowReader(folder, "proxy")


def test_proxy_rows_follow_the_training_rows(parts):
    train, proxy = parts
    joined = WithProxyRows(train, proxy, ROWS)
    assert len(joined) == len(train) + 3
    wanted = [len(train) + 2, 7, len(train), 0, len(train) + 1]
    records = joined.read(wanted)
    assert records["example_id"].tolist() == wanted
    sources = [proxy.read([9]), train.read([7]), proxy.read([5]), train.read([0]), proxy.read([0])]
    for field in ("tokens", "segment_ids", "loss_mask", "domain_id", "document_ids"):
        assert np.array_equal(records[field], np.concatenate(sources)[field])
    assert np.array_equal(joined[len(train)]["tokens"], proxy[5]["tokens"])
    columns = joined.columns(wanted)
    assert all(np.array_equal(columns[name], records[name]) for name in columns), "known without reading a record"
    assert joined.read([]).shape == (0,)


def test_documents_and_domains_of_the_joined_rows(parts):
    train, proxy = parts
    joined = WithProxyRows(train, proxy, ROWS)
    documents = joined.read(np.arange(len(joined)))["document_ids"]
    assert np.array_equal(joined.row_documents, documents)
    assert joined.domain_rows[:-1] == train.domain_rows
    assert joined.domain_rows[-1] == range(len(train), len(train) + 3)


def test_the_candidate_stream_draws_from_both(parts):
    train, proxy = parts
    joined = WithProxyRows(train, proxy, ROWS)
    counts = np.array([len(rows) for rows in joined.domain_rows])
    plan = fitted(Plan(np.array([1.0, 1.0, 0.0, 2.0])), counts)
    batch = next(CandidateStream(joined, plan, 0, every_step(40), threads=0))
    behind = batch["example_id"] >= len(train)
    assert abs(behind.sum() - 20) <= 1
    assert set(batch["example_id"][behind]) == {len(train), len(train) + 1, len(train) + 2}
    own = proxy.read(ROWS)["domain_id"]
    assert np.array_equal(batch["domain_id"][behind], own[batch["example_id"][behind] - len(train)])


def test_rows_that_are_not_there_are_refused(folder, parts, tmp_path):
    train, proxy = parts
    joined = WithProxyRows(train, proxy, ROWS)
    for index in (-1, len(joined)):
        with pytest.raises(IndexError, match=f"of {len(joined)} rows"):
            joined.read([0, index])
    for row in (-1, len(proxy)):
        with pytest.raises(UserError, match=rf"proxy rows .*there are {len(proxy)}"):
            WithProxyRows(train, proxy, np.array([0, row]))
    other = prepare_small(tmp_path, corpus={"row_tokens": 32})
    with pytest.raises(UserError, match="different corpora"):
        WithProxyRows(train, RowReader(other, "proxy"), ROWS)
