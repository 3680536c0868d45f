"""Damaged record files: named, or, when the reader is lenient, rows without text."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from small_corpus import prepare_small

from opus_jax.data.joined_reader import WithProxyRows
from opus_jax.data.records import Manifest, RowReader
from opus_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("records"))


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def damage_a_row(folder: Path) -> tuple[Path, int]:
    """Change a byte of a shard where one row lies; returns the shard and the row's index."""
    reader = RowReader(folder, "train")
    shard = folder / reader.manifest.shards["train"][1]
    content = bytearray(shard.read_bytes())
    content[2000] ^= 4  # records lie at the beginning, before the padding of the format
    shard.write_bytes(content)
    damaged = RowReader(folder, "train", lenient=True).read(np.arange(len(reader)))
    lost = np.flatnonzero(~damaged["segment_ids"].any(axis=1))
    assert len(lost) == 1
    return shard, int(lost[0])


def test_a_damaged_row_is_named_with_its_file(folder: Path) -> None:
    shard, row = damage_a_row(folder)
    reader = RowReader(folder, "train")
    with pytest.raises(UserError, match=rf"{shard.name} is damaged at row {row}, its row \d+ .*corpus.lenient=true"):
        reader.read(np.arange(len(reader)))
    others = np.delete(np.arange(len(reader)), row)
    assert np.array_equal(reader.read(others)["example_id"], others), "the same reader goes on with other rows"


def test_a_lenient_reader_puts_a_row_without_text_in_its_place(folder: Path) -> None:
    whole = RowReader(folder, "train")
    good = whole.read(np.arange(len(whole)))
    _, row = damage_a_row(folder)
    read = RowReader(folder, "train", lenient=True).read(np.arange(len(good)))
    assert not read[row]["loss_mask"].any()
    for name in ("example_id", "domain_id", "document_ids"):
        np.testing.assert_array_equal(read[name], good[name])
    others = np.arange(len(good)) != row
    np.testing.assert_array_equal(read[others], good[others])


@pytest.mark.parametrize("loss", ["missing", "truncated"])
def test_a_lost_shard_is_an_error_or_rows_without_text(folder: Path, loss: str) -> None:
    manifest, whole = Manifest.load(folder), RowReader(folder, "train")
    good = whole.read(np.arange(len(whole)))
    shard = folder / manifest.shards["train"][1]
    if loss == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{shard.name} is .*corpus.lenient=true"):
        RowReader(folder, "train")
    read = RowReader(folder, "train", lenient=True).read(np.arange(len(good)))
    lost = ~read["segment_ids"].any(axis=1)
    first, count = manifest.files[manifest.shards["train"][0]]["rows"], manifest.files[shard.name]["rows"]
    assert np.flatnonzero(lost).tolist() == list(range(first, first + count))
    np.testing.assert_array_equal(read["domain_id"], good["domain_id"])
    np.testing.assert_array_equal(read[~lost], good[~lost])


def test_other_files_are_needed_even_by_a_lenient_reader(folder: Path) -> None:
    (folder / "train.documents.npy").unlink()
    with pytest.raises(UserError, match=r"train.documents.npy is missing.*prepare again$"):
        RowReader(folder, "train", lenient=True)


def test_joined_readers_are_as_lenient_as_their_parts(folder: Path) -> None:
    _, row = damage_a_row(folder)
    train, proxy = (RowReader(folder, split, lenient=True) for split in ("train", "proxy"))
    read = WithProxyRows(train, proxy, np.arange(2)).read([row, len(train)])
    assert read["segment_ids"].any(axis=1).tolist() == [False, True]
    assert read["example_id"].tolist() == [row, len(train)]
