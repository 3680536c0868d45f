"""The adapter to `datasets`, against a stand-in with the one function that it calls."""

import sys
import types

import pytest

from opus_jax.config import CorpusConfig
from opus_jax.data.corpora import load_corpus
from opus_jax.errors import ConfigError, MissingExtraError, UserError

REVISION = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"id": f"doc-{i}", "text": f"page {i:02d} " + "x" * 92, "kind": "ab"[i % 2]} for i in range(20)]


class Hub:
    """Records how it was asked, and how much was read."""

    def __init__(self, rows):
        self.rows, self.asked, self.read = rows, [], 0

    def load_dataset(self, name, subset, *, split, revision, streaming):
        self.asked.append((name, subset, split, revision, streaming))
        for row in self.rows:
            self.read += 1
            yield row


@pytest.fixture
def hub(monkeypatch):
    hub = Hub(list(ROWS))
    module = types.ModuleType("datasets")
    module.load_dataset = hub.load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


def config(tmp_path, **keys) -> CorpusConfig:
    keys = {"name": "hf", "path": "org/pages:small", "revision": REVISION, "cache_dir": str(tmp_path)} | keys
    return CorpusConfig(**keys)


def documents(corpus):
    return {domain.name: list(domain.documents()) for domain in corpus.domains}


def test_a_pinned_stream_is_read_once_and_kept(hub, tmp_path):
    first = load_corpus(config(tmp_path))
    found = documents(first)
    assert [d.text for d in found["pages"]] == [row["text"] for row in ROWS]
    assert found["pages"][3].source == "org/pages:small:doc-3"
    assert first.versions["org/pages:small"] == REVISION
    assert "org/pages" in first.domains[0].licence
    assert documents(load_corpus(config(tmp_path))) == found
    assert hub.asked == [("org/pages", "small", "train", REVISION, True)]


def test_domains_by_field(hub, tmp_path):
    found = documents(load_corpus(config(tmp_path, path="org/pages", domain_by="field", domain_field="kind")))
    assert {name: len(d) for name, d in found.items()} == {"a": 10, "b": 10}
    assert hub.asked[0][:2] == ("org/pages", None)


def test_a_cap_ends_the_stream_early(hub, tmp_path):
    found = documents(load_corpus(config(tmp_path, max_bytes=350)))
    assert len(found["pages"]) == 3
    assert hub.read == 4
    keys = {"domain_by": "field", "domain_field": "kind", "domains": ["b"], "max_bytes": 250}
    found = documents(load_corpus(config(tmp_path, **keys)))
    assert [d.text[:7] for d in found["b"]] == ["page 01", "page 03"]
    assert hub.read == 4 + 6


def test_rows_without_text_are_counted_or_refused(hub, tmp_path):
    hub.rows[5] = {"text": None}
    hub.rows[7] = {"body": "x"}
    assert load_corpus(config(tmp_path)).problems.total == 2
    assert load_corpus(config(tmp_path)).problems.total == 2
    with pytest.raises(UserError, match="row 5: no field 'text'"):
        load_corpus(config(tmp_path, strict=True))
    assert not list((tmp_path / "hf").glob(".*")), "a partial folder was left"


def test_an_interrupted_stream_leaves_nothing_that_looks_complete(hub, tmp_path):
    def failing():
        yield from ROWS[:5]
        raise ConnectionError("no route\nto host")

    hub.rows = failing()
    with pytest.raises(UserError, match=r"org/pages:small at 0123.*no route to host"):
        load_corpus(config(tmp_path))
    hub.rows = list(ROWS)
    assert len(documents(load_corpus(config(tmp_path)))["pages"]) == 20


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"opus-jax\[hf\]"):
        load_corpus(config(tmp_path))


@pytest.mark.parametrize("revision", ["main", "v1.0", REVISION[:10]])
def test_a_moving_revision_is_refused(hub, tmp_path, revision):
    with pytest.raises(ConfigError, match=r"corpus\.revision.*commit hash"):
        load_corpus(config(tmp_path, revision=revision))
    assert hub.asked == []
