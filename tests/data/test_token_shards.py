"""Tokenizing in shards gives what tokenizing in one stream gives, and goes on where an earlier attempt ended."""

from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress
from small_corpus import documents

from opus_jax.data import token_shards
from opus_jax.data.documents_table import iterate_texts, write_documents
from opus_jax.data.token_shards import ShardTask, kept_tokens, tokenize_shards
from opus_jax.data.tokenize_documents import tokenize_texts
from opus_jax.data.tokenizer import byte_tokenizer
from opus_jax.errors import UserError

BAR = Progress(disable=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents in several row groups, and in many shards that do not end where the groups do."""
    monkeypatch.setattr(token_shards, "SHARD_BYTES", 5_000)
    monkeypatch.setattr("opus_jax.data.documents_table._GROUP_BYTES", 12_000)
    made = tmp_path / "made"
    made.mkdir()
    write_documents((("train", 0, document) for document in documents("prose", 120)), ["none"], made)
    byte_tokenizer().save(made)
    return made


class Engine:
    """Runs tasks in this process, last first, and dies after `limit` of them."""

    def __init__(self, limit: int | None = None):
        self.limit, self.done = limit, []

    def __call__(self, task, items):
        for item in reversed(items):
            if len(self.done) == self.limit:
                raise KeyboardInterrupt
            task(item)
            self.done.append(item)
            yield


def expected(folder: Path) -> tuple[bytes, np.ndarray]:
    spool = folder / "one.spool"
    lengths = tokenize_texts(iterate_texts(folder), folder, 1, spool)
    return spool.read_bytes(), lengths


def test_shards_give_the_same_file_as_one_stream(folder: Path):
    engine = Engine()
    lengths = tokenize_shards(folder, folder / "kept", folder / "spool", engine, BAR)
    tokens, counts = expected(folder)
    assert (folder / "spool").read_bytes() == tokens
    assert lengths.tolist() == counts.tolist()
    bounds = sorted((task.first, task.last) for task in engine.done)
    assert len(bounds) > 5
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]


def test_an_interrupted_preparation_goes_on(folder: Path):
    first, second, third = Engine(limit=3), Engine(), Engine()
    with pytest.raises(KeyboardInterrupt):
        tokenize_shards(folder, folder / "kept", folder / "spool", first, BAR)
    for engine in (second, third):
        tokenize_shards(folder, folder / "kept", folder / "spool", engine, BAR)
        assert (folder / "spool").read_bytes() == expected(folder)[0]
    assert {*first.done} & {*second.done} == set()
    assert third.done == []


def test_shards_of_other_documents_are_not_used(folder: Path):
    tokenize_shards(folder, folder / "kept", folder / "spool", Engine(), BAR)
    write_documents((("train", 0, document) for document in documents("verse", 40)), ["none"], folder)
    engine = Engine()
    tokenize_shards(folder, folder / "kept", folder / "spool", engine, BAR)
    assert engine.done
    assert (folder / "spool").read_bytes() == expected(folder)[0]


def test_a_task_may_run_again_and_again(folder: Path):
    def twice(task, items):
        for item in [*items, *items]:
            task(item)
            yield

    tokenize_shards(folder, folder / "kept", folder / "spool", twice, BAR)
    assert (folder / "spool").read_bytes() == expected(folder)[0]
    assert not [file for file in (folder / "kept").rglob(".*") if file.is_file()]


def test_a_task_that_dies_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def torn(file, **arrays):
        file.write(b"half")
        raise OSError("disk")

    monkeypatch.setattr(token_shards.np, "savez", torn)
    with pytest.raises(OSError, match="disk"):
        tokenize_shards(folder, folder / "kept", folder / "spool", Engine(), BAR)
    assert not [file for file in (folder / "kept").rglob("*") if file.is_file()]


def test_files_that_stay_on_another_machine_are_missed(folder: Path):
    with pytest.raises(UserError, match=r"another machine.*corpus.cache_dir"):
        tokenize_shards(folder, folder / "kept", folder / "spool", lambda task, items: iter(items), BAR)


def test_a_worker_that_does_not_see_the_documents_says_so(tmp_path: Path):
    byte_tokenizer().save(tmp_path)
    task = ShardTask(str(tmp_path), byte_tokenizer().hash, 0, 1, str(tmp_path / "0.npz"))
    with pytest.raises(UserError, match=r"cannot read.*corpus.cache_dir"):
        token_shards.tokenize_shard(task)


def test_no_documents_are_no_shards(tmp_path: Path):
    write_documents([], ["none"], tmp_path)
    byte_tokenizer().save(tmp_path)
    lengths = tokenize_shards(tmp_path, kept_tokens(tmp_path, "m"), tmp_path / "spool", Engine(), BAR)
    assert (len(lengths), (tmp_path / "spool").read_bytes()) == (0, b"")
