"""The user's files: every format, every way to name domains, and everything that can be wrong with a line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from opus_jax.config import CorpusConfig
from opus_jax.data.corpora import load_corpus
from opus_jax.data.corpora.cap import capped
from opus_jax.data.corpora.local import read_documents
from opus_jax.data.documents import Document, Domain
from opus_jax.errors import ConfigError, UserError

ROWS = [{"text": f"text {i}", "kind": "odd" if i % 2 else "even"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pool"
    for name in ("books", "web/deep", ".hidden"):
        (root / name).mkdir(parents=True)
    (root / "loose.txt").write_text("at the root\n")
    (root / "books/one.md").write_text("# One\r\n\r\nfirst book")
    (root / "books/two.jsonl.gz").write_bytes(gzip.compress(LINES))
    (root / "web/a.jsonl").write_bytes(LINES.replace(b"text ", b"page "))
    (root / "web/b.jsonl.zst").write_bytes(zstandard.compress(LINES.replace(b"text ", b"site ")))
    pq.write_table(pa.Table.from_pylist([{**r, "text": r["text"] + " p"} for r in ROWS]), root / "web/deep/c.parquet")
    (root / ".hidden/x.txt").write_text("not this")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


def config(path, tmp_path, **keys) -> CorpusConfig:
    return CorpusConfig(name="local", path=str(path), cache_dir=str(tmp_path / "cache"), **keys)


def texts(corpus) -> dict[str, list[str]]:
    return {domain.name: [d.text for d in domain.documents()] for domain in corpus.domains}


def test_domains_are_folders(folder, tmp_path):
    found = texts(load_corpus(config(folder, tmp_path)))
    assert {name: len(t) for name, t in found.items()} == {"books": 5, "pool": 1, "web": 12}
    assert found["books"][0] == "# One\n\nfirst book"
    assert found["web"][-1] == "text 3 p"


def test_domains_are_files(folder, tmp_path):
    found = texts(load_corpus(config(folder, tmp_path, domain_by="file")))
    assert sorted(found) == ["books/one", "books/two", "loose", "web/a", "web/b", "web/deep/c"]
    assert found["books/two"] == [row["text"] for row in ROWS]


def test_domains_are_values_of_a_field(folder, tmp_path):
    (folder / "loose.txt").unlink()
    (folder / "books/one.md").unlink()
    settings = config(folder, tmp_path, domain_by="field", domain_field="kind")
    found = texts(load_corpus(settings))
    assert {name: len(t) for name, t in found.items()} == {"even": 8, "odd": 8}
    assert texts(load_corpus(settings)) == found
    renamed = config(folder, tmp_path, domain_by="field", domain_field="text")
    assert len(load_corpus(renamed).domains) == 16


def test_a_single_file_is_a_corpus_and_sources_name_lines(folder, tmp_path):
    corpus = load_corpus(config(folder / "web/a.jsonl", tmp_path))
    assert [d.source for d in corpus.domains[0].documents()] == [f"a.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert corpus.domains[0].name == "a"


def test_versions_follow_the_content(folder, tmp_path):
    before = load_corpus(config(folder, tmp_path)).versions
    assert load_corpus(config(folder, tmp_path)).versions == before
    (folder / "loose.txt").write_text("at the roof\n")
    assert load_corpus(config(folder, tmp_path)).versions != before


BAD = {
    "not JSON": b'{"text": \n',
    "not UTF-8": b'{"text": "\xff"}\n',
    "not a JSON object": b'["text"]\n',
    "no field 'text'": b'{"body": "x"}\n',
    "field 'text' is not text": b'{"text": 3}\n',
    "field 'text' is empty": b'{"text": " "}\n',
    "field 'text' holds half a surrogate pair": b'{"text": "\\ud800"}\n',
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_malformed_lines_are_counted_once_with_their_place(tmp_path, suffix):
    raw = b'{"text": "good"}\n\n' + b"".join(BAD.values()) + b'{"text": "last"}'
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(pack(raw))
    corpus = load_corpus(config(file, tmp_path))
    assert texts(corpus) == texts(corpus) == {"rows": ["good", "last"]}
    report = corpus.problems.to_mapping()
    assert report["counts"] == {f"{file.name}: {reason}": 1 for reason in BAD}
    assert report["total"] == len(BAD)
    assert report["places"] == [f"{file.name}:{n}: {reason}" for n, reason in enumerate(BAD, 3)]


@pytest.mark.parametrize("reason", BAD)
def test_strict_refuses_a_malformed_line_and_names_it(tmp_path, reason):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + BAD[reason])
    corpus = load_corpus(config(file, tmp_path, strict=True))
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {reason}.*corpus\.strict=false"):
        texts(corpus)
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {reason}: correct it$"):
        list(read_documents(file, CorpusConfig()))


def test_problems_of_records_sorted_by_field_are_kept_with_the_cache(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINES + b'{"text": "no kind"}\n' + b"{\n")
    settings = config(file, tmp_path, domain_by="field", domain_field="kind")
    first, second = (load_corpus(settings).problems.to_mapping() for _ in range(2))
    assert first == second
    assert first["counts"] == {"rows.jsonl: no field 'kind'": 1, "rows.jsonl: not JSON": 1}


def test_lines_of_text_that_are_not_utf8_are_counted(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"one\n\xff\xfe\nthree\n")
    corpus = load_corpus(config(tmp_path / "note.txt", tmp_path))
    assert texts(corpus) == {"note": ["one\nthree\n"]}
    assert corpus.problems.to_mapping()["places"] == ["note.txt:2: not UTF-8"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_damaged_files_are_reported(tmp_path, suffix):
    pack = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress, ".parquet": lambda b: b}[suffix]
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(pack(LINES * 50)[:60])
    corpus = load_corpus(config(file, tmp_path))
    texts(corpus)
    assert "unreadable from here on" in corpus.problems.to_mapping()["places"][0]
    with pytest.raises(UserError, match="unreadable from here on"):
        texts(load_corpus(config(file, tmp_path, strict=True)))


def test_long_text_files_are_cut(tmp_path):
    (tmp_path / "long.txt").write_text("\n\n".join(f"Paragraph {i} of a long book." for i in range(9000)))
    corpus = load_corpus(config(tmp_path / "long.txt", tmp_path))
    found = texts(corpus)["long"]
    assert len(found) > 10
    assert "".join("".join(found).split()) == "".join((tmp_path / "long.txt").read_text().split())


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "no such file or folder"), ("empty", "file of a known kind: .txt")]
)
def test_a_path_without_text_is_named(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"corpus\.path.*{message}"):
        load_corpus(config(tmp_path / name, tmp_path))
    with pytest.raises(ConfigError, match=rf"proxy\.path.*{message}"):
        list(read_documents(tmp_path / name, CorpusConfig()))


def test_a_missing_column_is_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"c\.parquet has no column 'body'; it has text, kind"):
        texts(load_corpus(config(folder / "web/deep/c.parquet", tmp_path, text_field="body")))


def test_proxy_documents_come_from_all_domains(folder):
    assert len(list(read_documents(folder, CorpusConfig()))) == 18


def domain_of(sizes: list[int]) -> Domain:
    return Domain("d", "none", lambda: (Document(f"{i:03d}" + "x" * (s - 3), str(i)) for i, s in enumerate(sizes)))


def test_a_cap_keeps_a_spread_in_order_and_grows_with_itself():
    domain = domain_of([100] * 200)
    kept = [int(d.source) for d in capped(domain, 5000).documents()]
    assert len(kept) == 50
    assert kept == sorted(kept)
    assert 60 < sum(kept) / len(kept) < 140
    assert kept == [int(d.source) for d in capped(domain, 5000).documents()]
    assert set(kept) < {int(d.source) for d in capped(domain, 9000).documents()}


def test_a_cap_is_never_exceeded_and_a_hopeless_one_is_an_error():
    sizes = [50, 700, 80, 90, 300]
    for cap in (50, 100, 500, 5000):
        kept = list(capped(domain_of(sizes), cap).documents())
        assert 0 < sum(len(d.text) for d in kept) <= cap
    with pytest.raises(ConfigError, match=r"corpus\.max_bytes.*at least 50"):
        list(capped(domain_of(sizes), 49).documents())
    assert list(capped(domain_of([]), 10).documents()) == []


def test_the_cap_applies_to_each_domain(folder, tmp_path):
    found = texts(load_corpus(config(folder, tmp_path, max_bytes=20)))
    assert all(0 < sum(len(t.encode()) for t in kept) <= 20 for kept in found.values())
