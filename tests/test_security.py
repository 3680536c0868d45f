"""Data is never code, files stay in their folders, secrets stay out of run folders, and nothing asks the network."""

import ast
import json
import pickle
import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import mapping, write_text
from test_architecture import ROOT, SOURCES

from opus_jax.config import from_mapping
from opus_jax.data.prepare import prepare
from opus_jax.data.records import Manifest, RowReader
from opus_jax.data.remote import is_inside
from opus_jax.errors import ConfigError, UserError
from opus_jax.reports.html import write_report
from opus_jax.training.loop import train

# ------------------------------------------------------------------------------------------ data, not code

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"allow_pickle", "trust_remote_code", "shell"}
PROGRAMS = [*SOURCES, *(ROOT / "launch").rglob("*.py")]


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def dangers(source: str) -> list[str]:
    """What a piece of source does that could run what it reads."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLES]
    for call in calls(tree):
        if isinstance(call.func, ast.Name) and call.func.id in RUNS_TEXT:
            found.append(f"calls {call.func.id}")
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) in ("yaml.load", "os.system", "os.popen"):
            found.append(f"calls {ast.unparse(call.func)}")
        found += [
            f"gives {word.arg}"
            for word in call.keywords
            if word.arg in UNSAFE and not (isinstance(word.value, ast.Constant) and word.value.value is False)
        ]
    return found


def test_no_source_runs_what_it_reads() -> None:
    found = {file.relative_to(ROOT).as_posix(): dangers(file.read_text()) for file in PROGRAMS}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from torch import load", "eval('1')", "np.load(f, allow_pickle=True)", "yaml.load(f)",
     "run(x, shell=True)"],
)  # fmt: skip
def test_the_reader_of_sources_finds_what_it_looks_for(source: str) -> None:
    assert dangers(source)


def test_safe_calls_are_let_through() -> None:
    assert not dangers("np.load(f, allow_pickle=False)\nre.compile('x')\nyaml.safe_load(f)")


class Trap:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("sprung"),))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("security")
    write_text(root / "text")
    return root


def config(root: Path, *overrides: str, run: str = "run") -> Any:
    return from_mapping(mapping(root, run), overrides)


def test_a_pickle_among_the_records_is_refused_and_not_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = prepare(config(place, f"corpus.cache_dir={tmp_path}"), progress=False)
    file = folder / "train.documents.npy"
    file.write_bytes(pickle.dumps(np.array([Trap()] * 99, object))[: file.stat().st_size].ljust(file.stat().st_size))
    with pytest.raises(UserError, match=r"train\.documents\.npy"):
        _ = RowReader(folder, "train").row_documents
    assert not Path("sprung").exists()


# ---------------------------------------------------------------------------------------- inside a folder


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "", "."])
@pytest.mark.parametrize("where", ["files", "shards"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(place: Path, tmp_path: Path, name: str, where: str) -> None:
    folder = prepare(config(place), progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    if where == "files":
        manifest["files"][name] = {"rows": 0, "size": 1, "sha256": "0"}
    else:
        manifest["shards"]["train"][0] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="not a plain file name"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x", "a\0b"])
def test_a_listing_cannot_name_a_file_outside_its_folder(name: str) -> None:
    assert not is_inside(name)
    assert is_inside("a/b..c/x")


# ------------------------------------------------------------------------------------- secrets and network

SECRET = "plant3d-s3cret-value"


def test_no_secret_reaches_the_run_folder_and_no_socket_is_opened(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPUS_JAX_TOKEN", "JAX_SECRET", "HF_TOKEN", "GITHUB_PAT"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPUS_JAX_NOTE", f"https://me:{SECRET}@host/path?x=1 token={SECRET}")
    monkeypatch.setattr(sys, "argv", ["opus-jax", "train", "--api-key", SECRET, f"password={SECRET}"])
    opened: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            opened.append(address)
            raise OSError(f"a plain run asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **_: opened.append(asked))
    settings = ("selection.method=random", "run.steps=2", "run.eval_every=2", "tracking.tensorboard=true")
    train(config(place, *settings), progress=True)
    write_report(place / "run")
    assert not opened
    files = [file for file in (place / "run").rglob("*") if file.is_file()]
    assert {"config.yaml", "environment.json", "metrics.jsonl", "report.html", "summary.json"} <= {
        f.name for f in files
    }
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "<redacted>" in (place / "run" / "environment.json").read_text(), "it was there to be hidden"


@pytest.mark.parametrize("key", ["run.dir", "corpus.path", "proxy.path", "tokenizer.path", "run.compilation_cache"])
@pytest.mark.parametrize("login", [f"s3://user:{SECRET}@bucket/x", f"gs://bucket/x?access_token={SECRET}"])
def test_an_address_with_a_login_is_refused_without_showing_it(place: Path, key: str, login: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)) as refused:
        config(place, f"{key}={login}")
    assert SECRET not in str(refused.value)


def test_a_value_that_stands_for_a_variable_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with pytest.raises(ConfigError, match=r"tracking\.wandb.*must be the value itself") as refused:
        config(place, "tracking.wandb=${oc.env:WANDB_API_KEY}")
    assert SECRET not in str(refused.value)


def test_an_address_without_a_login_is_let_through(place: Path) -> None:
    assert config(place, "corpus.path=abfs://container@account.dfs.core.windows.net/x").corpus.path
