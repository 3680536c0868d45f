import json

import pytest

from opus_jax.training import integrity


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "5" / "state").mkdir(parents=True)
    (tmp_path / "5" / "meta").write_bytes(b"meta")
    (tmp_path / "5" / "state" / "big").write_bytes(bytes(range(256)) * 64)
    integrity.write_hashes(tmp_path, 5)
    return tmp_path


def test_untouched_files_have_no_problem(checkpoint):
    assert integrity.has_hashes(checkpoint, 5)
    assert integrity.problems(checkpoint, 5) == []


@pytest.mark.parametrize("at", [0, 8000, 64 * 256 - 1])
@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_bit_anywhere_is_seen(checkpoint, at, bit):
    file = checkpoint / "5" / "state" / "big"
    content = bytearray(file.read_bytes())
    content[at] ^= bit
    file.write_bytes(content)
    assert integrity.problems(checkpoint, 5) == ["state/big has changed since it was written"]


def test_truncated_and_missing_files_are_named(checkpoint):
    (checkpoint / "5" / "meta").unlink()
    (checkpoint / "5" / "state" / "big").write_bytes(b"short")
    assert integrity.problems(checkpoint, 5) == ["meta is missing", "state/big has 5 bytes instead of 16384"]


def test_an_empty_folder_is_a_problem_even_without_hashes(tmp_path):
    (tmp_path / "7").mkdir()
    assert integrity.problems(tmp_path, 7) == ["the folder is empty"]


def test_a_torn_list_of_hashes_is_a_problem(checkpoint):
    file = checkpoint / "integrity" / "5.json"
    file.write_text(file.read_text()[:30])
    assert "not readable" in integrity.problems(checkpoint, 5)[0]


def test_the_list_holds_sizes_and_sha256(checkpoint):
    files = json.loads((checkpoint / "integrity" / "5.json").read_text())["files"]
    # sha256 of the four bytes "meta", from coreutils
    assert files["meta"] == [4, "ea3bd73e2b506e00527232b3ed743c066da83a8e3066f62a71e75eb9b4aa1db6"]
    assert files.keys() == {"meta", "state/big"}


def test_lists_of_removed_steps_go(checkpoint):
    (checkpoint / "5").rename(checkpoint / "6")
    (checkpoint / "integrity" / ".partial-x").touch()
    assert integrity.hashed_steps(checkpoint) == [5]
    integrity.remove_orphans(checkpoint)
    assert list((checkpoint / "integrity").iterdir()) == []
