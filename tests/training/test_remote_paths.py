"""Records, texts and runs at addresses: memory:// stands for a bucket, file:// for one that several processes see."""

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_runs import small_config

from opus_jax import cli
from opus_jax.config import Config
from opus_jax.data.prepare import prepare
from opus_jax.data.records import Manifest
from opus_jax.data.remote import Remote, local_copy
from opus_jax.errors import ConfigError, MissingExtraError, UserError
from opus_jax.training.loop import train
from opus_jax.training.remote_run import RemoteRun

QUICK = ("selection.method=random", "run.steps=6", "run.eval_every=6", "run.save_every=2", "checkpoint.best=false")
DIGESTS = ("loss_digest", "batch_digest")


@pytest.fixture
def bucket() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of this file differ in nothing that is compiled, so they share what was compiled."""
    folder = tmp_path_factory.mktemp("remote")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, Any]:
    return train(small_config(root, *QUICK), progress=False)


def put(folder: Path, url: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            Remote(url).upload(file, file.relative_to(folder).as_posix())


def counted(name: str) -> Any:
    """Patches a method of Remote so that its calls are counted and still made."""
    return patch.object(Remote, name, autospec=True, side_effect=getattr(Remote, name))


# ----------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_files_go_there_and_come_back(kind: str, bucket: str, tmp_path: Path) -> None:
    remote = Remote(bucket if kind == "memory" else f"file://{tmp_path}/there")
    assert remote.list() == {}
    file = tmp_path / "one"
    for content in (b"first", b"second"):
        file.write_bytes(content)
        remote.upload(file, "a/b/one")
        assert remote.read("a/b/one") == content
    remote.upload(file, "two")
    assert sorted(remote.list()) == ["a/b/one", "two"]
    remote.download("a/b/one", tmp_path / "back" / "one")
    assert (tmp_path / "back" / "one").read_bytes() == b"second"
    remote.remove("two")
    assert sorted(remote.list()) == ["a/b/one"]
    with pytest.raises(UserError, match=r"cannot read gone from .*://"):
        remote.read("gone")


def test_an_upload_that_is_cut_off_leaves_the_old_file(tmp_path: Path) -> None:
    remote, file = Remote(f"file://{tmp_path}/there"), tmp_path / "one"
    file.write_text("whole")
    remote.upload(file, "one")

    def cut(self: Any, source: str, target: str, **_: Any) -> None:
        Path(target).write_text("wh")
        raise OSError("the line was cut")

    file.write_text("another")
    with (
        patch.object(type(remote._files), "put_file", cut),
        pytest.raises(UserError, match=r"cannot write one to file://.*the line was cut"),
    ):
        remote.upload(file, "one")
    assert remote.read("one") == b"whole"
    assert sorted(remote.list()) == ["one"], "what is half there is not listed"


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_named_with_its_extra(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(fsspec.registry.target if hasattr(fsspec.registry, "target") else {}, scheme, raising=False)
    with pytest.raises(MissingExtraError, match=rf"'{package}': pip install \"opus-jax\[remote\]\""):
        Remote(f"{scheme}://bucket/run")


def test_an_unknown_kind_of_address_is_one_line() -> None:
    with pytest.raises(UserError, match=r"floppy://disk: .*gs:// and s3:// are known"):
        Remote("floppy://disk")


# ------------------------------------------------------------------------------------- corpora and records


def test_texts_are_copied_once_and_again_when_they_change(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "text" / "sea").mkdir(parents=True)
    (tmp_path / "text" / "sea" / "1.txt").write_text("waves")
    with pytest.raises(UserError, match="holds no file"):
        local_copy(f"{bucket}/text", tmp_path / "cache")
    put(tmp_path / "text", f"{bucket}/text")
    with counted("download") as downloads:
        copy = local_copy(f"{bucket}/text", tmp_path / "cache")
        assert (copy.name, (copy / "sea" / "1.txt").read_text()) == ("text", "waves")
        local_copy(f"{bucket}/text", tmp_path / "cache")
        assert downloads.call_count == 1
        (tmp_path / "text" / "sea" / "2.txt").write_text("foam")
        put(tmp_path / "text", f"{bucket}/text")
        assert sorted(file.name for file in (local_copy(f"{bucket}/text", tmp_path / "cache") / "sea").iterdir()) == [
            "1.txt", "2.txt",
        ]  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    return {name: facts["sha256"] for name, facts in Manifest.load(folder).files.items()}


def test_texts_at_an_address_give_the_rows_of_the_same_texts_here(root: Path, bucket: str) -> None:
    here = prepare(small_config(root), progress=False)
    put(root / "text", f"{bucket}/text")
    there = prepare(small_config(root, f"corpus.path={bucket}/text"), progress=False)
    assert here != there
    assert hashes(here) == hashes(there)


def given(root: Path, url: str, *settings: str) -> Config:
    return small_config(root, "corpus.name=records", f"corpus.path={url}", *settings)


def test_prepared_records_are_copied_once_and_compared_with_their_hashes(
    root: Path, bucket: str, tmp_path: Path
) -> None:
    here, cache = prepare(small_config(root), progress=False), f"corpus.cache_dir={tmp_path}"
    put(here, bucket)
    with counted("download") as downloads:
        there = prepare(given(root, bucket, cache), progress=False)
        copied = downloads.call_count
        assert prepare(given(root, bucket, cache), progress=False) == there
        assert downloads.call_count == copied == len(hashes(here))
    assert hashes(there) == hashes(here)
    assert Manifest.load(there).fingerprint == Manifest.load(here).fingerprint, "a run may go on with either"
    assert prepare(given(root, str(here)), progress=False) == here, "a folder is read where it is"


def test_damaged_records_at_an_address_are_refused_and_not_kept(root: Path, bucket: str, tmp_path: Path) -> None:
    here = prepare(small_config(root), progress=False)
    put(here, bucket)
    content = bytearray((here / "train-00000-of-00001.array_record").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    Remote(bucket).upload(tmp_path / "flipped", "train-00000-of-00001.array_record")
    with pytest.raises(UserError, match=r"records at memory://.* are not whole.*SHA-256"):
        prepare(given(root, bucket, f"corpus.cache_dir={tmp_path}/cache"), progress=False)
    assert not [file for file in (tmp_path / "cache" / "records").iterdir() if file.is_dir()]


def test_what_prepared_records_cannot_give_is_refused(root: Path, bucket: str) -> None:
    here = prepare(small_config(root), progress=False)
    with pytest.raises(ConfigError, match=r"corpus\.row_tokens.* have 32 tokens"):
        prepare(given(root, str(here), "corpus.row_tokens=64"), progress=False)
    with pytest.raises(ConfigError, match=r"corpus\.domains.*prepared already"):
        given(root, str(here), "corpus.domains=[prose]")
    with pytest.raises(UserError, match=r"no prepared corpus"):
        prepare(given(root, bucket), progress=False)


# ---------------------------------------------------------------------------------------------------- runs


def machine(root: Path, name: str) -> tuple[str, ...]:
    """Another machine has another cache; texts and records are the same."""
    shutil.copytree(root / "cache", root / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("remote"))
    return (f"corpus.cache_dir={root / name}",)


def test_a_run_at_an_address_goes_on_from_there_on_another_machine(
    root: Path, undisturbed: dict[str, Any], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/runs/far"
    first = train(small_config(root, *QUICK, *machine(root, "one"), f"run.dir={url}"), progress=False)
    assert {key: first[key] for key in DIGESTS} == {key: undisturbed[key] for key in DIGESTS}
    names = set(Remote(url).list())
    assert {"config.yaml", "metrics.jsonl", "summary.json", "environment.json"} <= names
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {"4", "6", "integrity"}
    assert not [name for name in names if "lock" in name or "partial" in name or "tmp" in name]

    for name in names:  # as if the first machine had died before the last checkpoint was whole
        if name in ("summary.json", "checkpoints/integrity/6.json"):
            Remote(url).remove(name)
    again = train(small_config(root, *QUICK, *machine(root, "two"), f"run.dir={url}"), progress=False)
    assert again["attempts"] == 2, "it went on, and did not begin anew"
    assert {key: again[key] for key in DIGESTS} == {key: undisturbed[key] for key in DIGESTS}
    monkeypatch.setenv("OPUS_JAX_CACHE", str(root / "three"))
    assert cli.main(["report", url]) == cli.DONE
    assert b"Where the time went" in Remote(url).read("report.html")


def test_a_place_that_cannot_be_written_stops_the_run_with_one_line(root: Path, bucket: str) -> None:
    run = RemoteRun(f"{bucket}/run", root / "cache")
    with run, patch.object(type(run._remote._files), "put_file", side_effect=OSError("403")):
        (run.folder / "metrics.jsonl").write_text("{}\n")
        with pytest.raises(UserError, match=r"cannot write metrics\.jsonl to memory://.*403"):
            run.send()
    assert Remote(f"{bucket}/run").read("metrics.jsonl") == b"{}\n", "what could not be sent is tried again at the end"


def test_two_processes_cannot_hold_one_copy(root: Path, bucket: str) -> None:
    with (
        RemoteRun(f"{bucket}/run", root / "cache"),
        pytest.raises(UserError, match="is training in"),
        RemoteRun(f"{bucket}/run", root / "cache"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("fatal", ["checkpoints/8/", "checkpoints/integrity/8.json"])
def test_killed_in_an_upload_it_goes_on_from_what_is_whole_there(root: Path, tmp_path: Path, fatal: str) -> None:
    expected = train(small_config(root, run="plain"), progress=False)
    url, script = f"file://{tmp_path}/there/run", Path(__file__).with_name("remote_child.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))}

    def child(cache: str, name: str) -> int:
        (place,) = machine(root, cache)
        command = [sys.executable, str(script), str(root), url, place.partition("=")[2], name]
        return subprocess.run(command, env=env, timeout=400, check=False).returncode

    assert child("killed", fatal) == -signal.SIGKILL
    assert child("next", "") == 0
    summary = json.loads(Remote(url).read("summary.json"))
    assert summary["attempts"] == 2, "it went on from step 4"
    assert {key: summary[key] for key in DIGESTS} == {key: expected[key] for key in DIGESTS}
