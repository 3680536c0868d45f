import json
import shutil

import numpy as np
import pytest
from small_corpus import prepare_small

from opus_jax.data.records import Manifest, RowReader, batch_of
from opus_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_small(tmp_path_factory.mktemp("records"))


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy to damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


def shard_of(folder, index=1):
    return folder / Manifest.load(folder).shards["train"][index]


def test_rows_are_numbered_and_domains_contiguous(prepared):
    reader, manifest = RowReader(prepared, "train"), Manifest.load(prepared)
    assert len(manifest.shards["train"]) > 3
    records = reader.read(np.arange(len(reader)))
    assert np.array_equal(records["example_id"], np.arange(len(reader)))
    assert np.array_equal(records["document_ids"], reader.row_documents)
    for domain, (rows, name) in enumerate(zip(reader.domain_rows, manifest.domains, strict=True)):
        assert len(rows) == manifest.rows["train"][name]
        assert (records["domain_id"][rows.start : rows.stop] == domain).all()
    assert len(reader) == manifest.total_rows("train")


def test_many_rows_are_read_in_the_order_asked_for(prepared):
    reader = RowReader(prepared, "train")
    wanted = np.random.default_rng(0).integers(0, len(reader), 300)
    records = reader.read(wanted)
    assert np.array_equal(records["example_id"], wanted)
    assert np.array_equal(records["tokens"][17], reader[int(wanted[17])]["tokens"])
    assert reader.read([]).shape == (0,)
    batch = batch_of(records)
    assert batch["loss_mask"].dtype == np.float32
    assert np.array_equal(batch["loss_mask"], records["loss_mask"])


@pytest.mark.parametrize("index", [-1, 10**6])
def test_rows_outside_are_refused(prepared, index):
    with pytest.raises(IndexError):
        RowReader(prepared, "train")[index]


def test_an_unknown_split_and_an_absent_folder_are_refused(prepared, tmp_path):
    with pytest.raises(UserError, match=r"'test' of .*: there are train"):
        RowReader(prepared, "test")
    with pytest.raises(UserError, match=r"no prepared corpus in .*run opus-jax prepare"):
        Manifest.load(tmp_path)


def test_a_truncated_or_missing_file_is_named(folder):
    shard = shard_of(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard.name} is .* bytes long, the manifest says"):
        RowReader(folder, "train")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        RowReader(folder, "train")


def test_a_shard_with_other_rows_is_named(folder):
    shard = shard_of(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][shard.name]["rows"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{shard.name} holds"):
        RowReader(folder, "train")


def test_a_flipped_byte_is_found_by_reading_or_by_the_checksum(folder):
    shard = shard_of(folder)
    good = shard.read_bytes()
    reader = RowReader(folder, "train")
    rows = reader.read(np.arange(len(reader)))
    messages = []
    for place in np.linspace(0, len(good) - 1, 40).astype(int):
        bad = bytearray(good)
        bad[place] ^= 0x10
        shard.write_bytes(bytes(bad))
        with pytest.raises(UserError, match=f"{shard.name} differs from its SHA-256"):
            Manifest.load(folder).check_contents(folder)
        try:
            read = RowReader(folder, "train").read(np.arange(len(rows)))
        except UserError as error:
            messages.append(str(error))
        else:
            assert np.array_equal(read, rows)  # never silently another text
    assert messages
    assert all(shard.name in message for message in messages)


def test_checksums_hold_for_an_untouched_folder(prepared):
    Manifest.load(prepared).check_contents(prepared)


@pytest.mark.parametrize("name", ["../outside.array_record", "/etc/passwd", "sub/file", "..", ""])
@pytest.mark.parametrize("field", ["shards", "files"])
def test_a_manifest_cannot_point_out_of_its_folder(folder, name, field):
    manifest = json.loads((folder / "manifest.json").read_text())
    if field == "shards":
        manifest["shards"]["train"][0] = name
    else:
        manifest["files"][name] = {"rows": 0, "size": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a plain file name"):
        RowReader(folder, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}', "null"])
def test_a_damaged_manifest_is_named(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        Manifest.load(folder)


def test_another_format_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match=r"record format 99, this version reads \d+: run opus-jax prepare"):
        Manifest.load(folder)
