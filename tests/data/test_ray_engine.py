"""Preparation on a Ray cluster of this machine, of whose workers one is killed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpus import prepare_small

from opus_jax.data import build_records
from opus_jax.data.records import sha256
from opus_jax.errors import MissingExtraError

ROOT = Path(__file__).resolve().parents[2]


def test_without_ray_the_extra_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    monkeypatch.setattr(build_records, "write_documents", lambda *_: pytest.fail("read"))
    with pytest.raises(MissingExtraError, match=r"opus-jax\[ray\]"):
        prepare_small(tmp_path, prepare={"engine": "ray"})


# In a process of its own, without the import hooks of the tests. A worker is killed as soon as two shards are there.
PREPARATION = """
import os, signal, sys, threading, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from opus_jax.data import build_records, ray_engine, token_shards
from opus_jax.errors import UserError
from small_corpus import prepare_small

cache, seen = Path({cache!r}), Path({seen!r})
token_shards.SHARD_BYTES = 1500

def kill():
    while not list(cache.glob("records/.tokens-*/*/*.npz")):
        time.sleep(0.01)
    os.kill(int(min(seen.iterdir()).name), signal.SIGKILL)
    print("killed with", len(list(cache.glob("records/.tokens-*/*/*.npz"))), flush=True)

def on_ray(task, items):
    def slow(item):
        (seen / str(os.getpid())).touch()
        time.sleep(0.1)
        task(item)

    threading.Thread(target=kill, daemon=True).start()
    yield from ray_engine.run_on_ray(slow, items)
    print("of", len(items), flush=True)

build_records.run_on_ray = on_ray
def fail(item):
    raise UserError("the shelf is empty: fill it")

try:
    list(ray_engine.run_on_ray(fail, [1, 2]))
except UserError as error:
    print("refused with", str(error).replace(" ", "-"), flush=True)
print("made", prepare_small(cache, prepare=dict(engine="ray")), flush=True)
"""


TOLD = ("refused with", "killed with", "of ", "made ")


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path: Path):
    script, seen = tmp_path / "preparation.py", tmp_path / "seen"
    seen.mkdir()
    values = {"root": str(ROOT), "tests": str(Path(__file__).parent), "cache": str(tmp_path / "ray"), "seen": str(seen)}
    script.write_text(PREPARATION.format(**values))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines() if line.startswith(TOLD)}
    assert told["refused"] == "the-shelf-is-empty:-fill-it"
    assert int(told["killed"]) < int(told["of"]), done.stdout
    assert len(list(seen.iterdir())) >= 2  # the one that was killed, and who did its work
    made, local = Path(told["made"]), prepare_small(tmp_path / "local")
    assert {f.name: sha256(f) for f in made.iterdir()} == {f.name: sha256(f) for f in local.iterdir()}
    assert not list(made.parent.glob(".tokens-*"))
