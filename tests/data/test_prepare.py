import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_corpus import corpus, prepare_small, small_config

import opus_jax.data.prepare as preparation
from opus_jax.data.documents_table import iterate_texts, read_columns
from opus_jax.data.records import SPLITS, Manifest, RowReader, sha256
from opus_jax.data.tokenizer import load_tokenizer
from opus_jax.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache):
    return prepare_small(cache)


def contents(folder):
    return {file.name: sha256(file) for file in folder.iterdir()}


def test_every_document_can_be_read_back_from_the_rows(folder):
    tokenizer = load_tokenizer(folder)
    parts: dict[int, list[int]] = {}
    table = read_columns(folder, "document_id", "split", "domain_id", "bytes")
    for split in SPLITS:
        reader = RowReader(folder, split)
        for record in reader.read(np.arange(len(reader))):
            for place in range(record["segment_ids"].max()):
                document = int(record["document_ids"][place])
                assert table["split"][document] == split
                assert table["domain_id"][document] == record["domain_id"]
                parts.setdefault(document, []).extend(record["tokens"][record["segment_ids"] == place + 1])
    texts = list(iterate_texts(folder))
    assert table["document_id"] == list(range(len(texts))) == sorted(parts)
    assert [tokenizer.decode(parts[i]) for i in range(len(texts))] == texts
    assert [len(text.encode()) for text in texts] == table["bytes"]


def test_the_manifest_counts_what_is_there(folder):
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder)
    assert manifest.tokenizer_hash == tokenizer.hash
    assert manifest.vocab_size == tokenizer.vocab_size == 320
    assert manifest.licences == [f"licence of {d}" for d in manifest.domains]
    for split in SPLITS:
        reader = RowReader(folder, split)
        records = reader.read(np.arange(len(reader)))
        targets = records["tokens"][records["loss_mask"] == 1]
        documents = sum(manifest.documents[split].values())
        assert len(targets) == sum(manifest.tokens[split].values()) + documents  # one EOS each
        assert tokenizer.token_bytes[targets].sum() == sum(manifest.bytes[split].values())
        assert manifest.padding[split] == pytest.approx((records["segment_ids"] == 0).mean(), abs=1e-6)
    assert manifest.total_documents() == len(read_columns(folder, "split")["split"])
    assert manifest.details["versions"] == {"small": "1"}
    assert manifest.details["problems"]["total"] == 0
    assert "removed" in manifest.details["splits"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    assert contents(prepare_small(tmp_path, corpus={"workers": 3})) == contents(folder)


def test_a_complete_folder_is_returned_at_once(folder, cache, monkeypatch):
    monkeypatch.setattr(preparation, "build_records", lambda *args: pytest.fail("prepared again"))
    assert prepare_small(cache) == folder
    assert prepare_small(cache, corpus={"weights": {"code": 1.0}, "workers": 2}) == folder


def test_a_damaged_folder_is_reported_not_used(tmp_path):
    folder = prepare_small(tmp_path)
    (folder / "documents.parquet").unlink()
    with pytest.raises(UserError, match=r"documents.parquet is missing.*prepare again"):
        prepare_small(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"corpus": {"row_tokens": 32}},
        {"corpus": {"max_bytes": 10**6}},
        {"corpus": {"validation_share": 0.1}},
        {"corpus": {"proxy_share": 0.1}},
        {"corpus": {"noise": {"code": "shuffle:0.5"}}},
        {"corpus": {"domains": ["code"]}},
        {"tokenizer": {"vocab_size": 330}},
        {"tokenizer": {"kind": "byte"}},
    ],
    ids=str,
)
def test_whatever_changes_the_records_changes_their_folder(tmp_path, change):
    def mark(**sections):
        return preparation._fingerprint(small_config(tmp_path, **sections), corpus(), [])

    assert mark(**change) != mark()
    assert mark(corpus={"workers": 5, "cache_dir": "elsewhere", "weights": {"code": 1.0}}) == mark()


def test_the_byte_tokenizer_and_row_length_are_obeyed(tmp_path):
    folder = prepare_small(tmp_path, tokenizer={"kind": "byte"}, corpus={"row_tokens": 40})
    manifest = Manifest.load(folder)
    assert (manifest.row_tokens, manifest.vocab_size) == (40, 260)
    assert manifest.tokens == manifest.bytes
    assert RowReader(folder, "train")[0]["tokens"].shape == (40,)


def test_splits_without_rows_are_refused_by_name(cache, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"proxy.domains = 'cod'.*nearest is 'code'"):
        prepare_small(cache, proxy={"domains": ["cod"]})
    with pytest.raises(UserError, match=r"no proxy rows in domain 'tables'.*corpus.proxy_share = 0.001"):
        prepare_small(tmp_path, corpus={"proxy_share": 0.001}, proxy={"domains": ["tables"]})
    assert not list((tmp_path / "records").glob("[!.]*"))
    assert prepare_small(tmp_path, corpus={"proxy_share": 0.001}, selection={"method": "random"}).is_dir()


def test_proxy_files_become_the_proxy_split(cache, folder, tmp_path):
    files = tmp_path / "mine"
    files.mkdir()
    for i in range(3):
        (files / f"{i}.txt").write_text(f"what {i} I want " * 30)
    made = prepare_small(cache, proxy={"source": "files", "path": str(files)})
    manifest = Manifest.load(made)
    assert made != folder
    assert manifest.domains == ["prose", "code", "tables", "proxy-files"]
    assert [manifest.rows[s]["proxy-files"] > 0 for s in SPLITS] == [False, False, True]
    assert manifest.documents["proxy"] == {"prose": 0, "code": 0, "tables": 0, "proxy-files": 3}
    proxy = RowReader(made, "proxy")
    assert set(proxy.read(np.arange(len(proxy)))["domain_id"]) == {3}
    (files / "0.txt").write_text("something else")
    assert prepare_small(cache, proxy={"source": "files", "path": str(files)}) != made


def test_an_unwritable_cache_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*corpus.cache_dir"):
        prepare_small(tmp_path / "file")


def test_a_failure_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("opus_jax.data.build_records.tokenize_texts", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_small(tmp_path)
    assert not list((tmp_path / "records").glob("[!.]*"))
    assert not list((tmp_path / "records").glob(".*partial*"))


def _interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), RuntimeError(f"write() failed: {os.strerror(28)}")])
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, error):
    def full(*args):
        raise error

    monkeypatch.setattr("opus_jax.data.build_records.tokenize_texts", full)
    with pytest.raises(UserError, match=r"no space left in .*corpus.cache_dir"):
        prepare_small(tmp_path)


# A preparation in a process of its own, which stops for ever when it comes to one of its stages.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import opus_jax.data.build_records, opus_jax.data.prepare, opus_jax.data.tokenize_documents
from small_corpus import prepare_small

def stop(*args, **kwargs):
    print("reached", flush=True)
    time.sleep(100)

def stop_with_workers(pool, batches, ahead):
    pool.submit(len, "").result()
    stop()

if __name__ == "__main__":
    if {stage!r}:
        module, name = {stage!r}.rsplit(":", 1)
        setattr(eval(module), name, {how})
    print(prepare_small({cache!r}, corpus={{"workers": {workers}}}), flush=True)
"""


def start(tmp_path, stage="", how="stop", workers=1):
    values = {"tests": str(Path(__file__).parent), "cache": str(tmp_path / "cache")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(stage=stage, how=how, workers=workers, **values))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "stage",
    ["opus_jax.data.build_records:tokenize_texts", "opus_jax.data.prepare.os:rename"],
    ids=["tokenizing", "before the last rename"],
)
def test_a_killed_preparation_leaves_nothing_that_looks_complete(folder, tmp_path, stage):
    process = start(tmp_path, stage)
    assert process.stdout.readline() == "reached\n"
    process.kill()
    process.wait()
    records = tmp_path / "cache" / "records"
    assert len(list(records.glob(".*partial*"))) == 1
    assert not list(records.glob("[!.]*"))
    again = prepare_small(tmp_path / "cache")
    assert contents(again) == contents(folder)
    assert not list(records.glob(".*partial*"))


def test_two_preparations_at_once_make_one_folder(folder, tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (made,) = printed
    assert contents(Path(made)) == contents(folder)
    assert [f.name for f in Path(made).parent.glob("[!.]*")] == [Path(made).name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_workers_do_not_outlive_a_killed_preparation(tmp_path):
    process = start(tmp_path, "opus_jax.data.tokenize_documents:_in_order", "stop_with_workers", workers=2)
    assert process.stdout.readline() == "reached\n"
    workers = _children(process.pid)
    assert workers
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(_state(pid) not in ("gone", "Z") for pid in workers):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "gone"
