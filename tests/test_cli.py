"""The command line as a person meets it: every mistake is one line that helps, and every command does its work."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config

from opus_jax import cli
from opus_jax.training import build, loop

Output = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

TRAIN = "train good.yaml"
SENTENCEPIECE = f"{TRAIN} tokenizer.kind=sentencepiece"
PREPARE = "prepare good.yaml proxy.domains=[]"
FILES = f"{TRAIN} proxy.source=files"

# The command, and what its one line must say: the key or file, its value, and what is allowed or what to do.
MISTAKES = {
    "unknown key": (f"{TRAIN} selection.temprature=1", ["selection.temprature = 1", "selection.temperature"]),
    "unknown section": (f"{TRAIN} modle.width=1", ["modle", "nearest is model"]),
    "wrong type": (f"{TRAIN} run.steps=many", ["run.steps = 'many'", "a whole number"]),
    "a fraction of a step": (f"{TRAIN} run.steps=3.5", ["run.steps = 3.5", "a whole number"]),
    "no list": (f"{TRAIN} proxy.domains=prose", ["proxy.domains = 'prose'", "a list of names, such as [one,two]"]),
    "no number": (f"{TRAIN} optimizer.clip=[1]", ["optimizer.clip = [1]", "a number, or null"]),
    "no mapping": (f"{TRAIN} corpus.weights=3", ["corpus.weights = 3", "a mapping of names to numbers"]),
    "weight": (f"{TRAIN} corpus.weights.prose=lots", ["corpus.weights.prose = 'lots'", "a number"]),
    "torn override": (f"{TRAIN} run.steps=[", ["'run.steps=['", "not readable YAML"]),
    "section left out": (f"{TRAIN} width=64", ["width = 64", "nearest is model.width"]),
    "direction": (f"{TRAIN} selection.direction=muon_frozen", ["direction = 'muon_frozen'", "vjp, adamw_frozen"]),
    "unprepared": (f"{TRAIN} corpus.path=text/prose proxy.domains=[] model.heads=3", ["model.heads = 3", "width = 32"]),
    "value for a section": (f"{TRAIN} run=3", ["run = 3", "dir, seed, steps"]),
    "ratio 0": (f"{TRAIN} selection.ratio=0", ["selection.ratio = 0.0", "above 0 and at most 1"]),
    "not a number": (f"{TRAIN} optimizer.learning_rate=nan", ["optimizer.learning_rate = nan", "at least 0"]),
    "unknown choice": (f"{TRAIN} selection.method=best", ["selection.method = 'best'", "opus, paper, greats"]),
    "unknown preset": (f"{TRAIN} model.preset=gpt3", ["model.preset = 'gpt3'", "gpt2-small"]),
    "heads and width": (f"{TRAIN} model.heads=3", ["model.heads = 3", "must divide model.width = 32"]),
    "window and row": (f"{TRAIN} selection.window=64", ["selection.window = 64", "at most corpus.row_tokens = 32"]),
    "vocabulary": (f"{TRAIN} model.vocab_size=9", ["model.vocab_size = 9", "at least the tokenizer's, 260"]),
    "rows and mesh": (f"{TRAIN} batch.rows=12", ["batch.rows = 12", "multiple of the 8 data shards"]),
    "kernel and devices": (
        f"{TRAIN} selection.engine=ghost selection.kernel=pallas",
        ["selection.kernel = 'pallas'", "cpu devices", "xla or null"],
    ),
    "mesh and devices": (f"{TRAIN} mesh.fsdp=3", ["mesh", "fsdp 3", "number of devices, 8"]),
    "unknown domain": (f"{TRAIN} corpus.domains=[pose]", ["corpus.domains = 'pose'", "nearest is 'prose'"]),
    "unknown weight": (f"{TRAIN} corpus.weights.pose=1", ["corpus.weights.pose", "nearest is 'prose'"]),
    "unknown proxy domain": (f"{TRAIN} proxy.domains=[pose]", ["proxy.domains = 'pose'", "nearest is 'prose'"]),
    "unknown noisy domain": (f"{TRAIN} corpus.noise.pose=shuffle:1", ["corpus.noise.pose", "nearest is 'prose'"]),
    "unknown noise": (f"{TRAIN} corpus.noise.prose=shufle:1", ["corpus.noise.prose = 'shufle:1'", "is shuffle"]),
    "unpinned dataset": (f"{TRAIN} corpus.name=hf", ["corpus.revision = None", "commit hash"]),
    "no such configuration": ("train nowhere.yaml", ["nowhere.yaml", "give a YAML file"]),
    "not YAML": ("train torn.yaml", ["torn.yaml is not readable YAML", "line 1"]),
    "not a mapping": ("train list.yaml", ["list.yaml must hold a mapping", "corpus"]),
    "not text": ("train binary.yaml", ["binary.yaml is not readable YAML"]),
    "a folder that is no run": ("train empty", ["empty/config.yaml", "run folder"]),
    "malformed line": (
        f"{PREPARE} corpus.strict=true corpus.path=torn.jsonl",
        ["torn.jsonl:2: not JSON", "corpus.strict=false"],
    ),
    "no corpus": ("prepare good.yaml corpus.path=nowhere", ["corpus.path = 'nowhere'", "no such file"]),
    "no readable file": ("prepare good.yaml corpus.path=empty", ["corpus.path = 'empty'", ".jsonl", ".parquet"]),
    "empty corpus": (f"{PREPARE} corpus.path=blank", ["no document is left", "give more documents"]),
    "no proxy path": (FILES, ["proxy.path = None", "needs a file or folder"]),
    "missing proxy files": (f"{FILES} proxy.path=nowhere", ["proxy.path = 'nowhere'", "no such file"]),
    "empty proxy files": (f"{FILES} proxy.path=blank", ["blank/a.txt", "empty"]),
    "no tokenizer": (f"{SENTENCEPIECE} tokenizer.path=no.model", ["tokenizer.path = 'no.model'", "give a .model file"]),
    "topology": ("compile good.yaml --topology v5p", ["'v5p'", "v5p:2x2x4"]),
    "generation": ("compile good.yaml --topology v9:2x2", ["'v9:2x2'", "v5e, v5p, v6e"]),
    "slice": ("compile good.yaml --topology v5p:3x3x3", ["'v5p:3x3x3'", "2x2x4"]),
    "no slice": ("compile good.yaml --topology v5e:2x2 --slices 0", ["0 slices", "at least 1"]),
    "step": ("compile good.yaml --topology v5e:2x2 --steps train,fly", ["--steps fly", "train,plain,score,decode"]),
    "evaluate before training": ("evaluate untrained", ["no checkpoint in", "untrained", "train the run first"]),
    "generate before training": ("generate untrained", ["no checkpoint in", "untrained", "train the run first"]),
    "score before training": ("score untrained", ["no checkpoint in", "untrained", "train the run first"]),
    "score an unknown split": ("score untrained --split test", ["--split test", "train, validation, proxy"]),
    "score with another model": ("score untrained model.layers=2", ["model.layers = 2", "belongs to the checkpoint"]),
    "no such run": ("evaluate nowhere", ["nowhere", "run folder"]),
    "temperature": ("generate untrained --temperature=-1", ["temperature = -1.0", "at least 0"]),
    "top-p": ("generate untrained --top-p 2", ["top_p = 2.0", "above 0 and at most 1"]),
    "report on nothing": ("report nowhere", ["nowhere", "run folder"]),
    "compared with nothing": ("report untrained --compare nowhere", ["nowhere is not a run folder", "run.dir"]),
    "unknown command": ("fly", ["'fly'", "'train'"]),
    "no command": ("", ["COMMAND", "--help"]),
    "no configuration": ("train", ["required: CONFIG", "--help"]),
    "unknown option": (f"{TRAIN} --fast", ["--fast", "--help"]),
    "option of a wrong type": ("generate untrained --tokens many", ["--tokens", "'many'"]),
    "override without =": (f"{TRAIN} run.steps", ["'run.steps'", "key.sub=value"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus, and some files that no command can use."""
    folder = tmp_path_factory.mktemp("place")
    config = small_config(folder, "run.steps=6", "run.eval_every=3", "selection.audit_every=0", "model.vocab_size=300")
    config.save(folder / "good.yaml")
    (folder / "torn.yaml").write_text("run: {steps: 3\nmodel: [\n")
    (folder / "list.yaml").write_text("- run\n- corpus\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "torn.jsonl").write_text('{"text": "whole"}\n{"text": "to\n')
    for name in ("empty", "blank", "untrained"):
        (folder / name).mkdir()
    (folder / "blank" / "a.txt").write_text(" \n")
    config.save(folder / "untrained" / "config.yaml")
    assert cli.main(["prepare", str(folder / "good.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    assert cli.main(["train", str(place / "good.yaml")]) == 0
    return place / "run"


def call(command: str) -> int:
    try:
        return cli.main(shlex.split(command))
    except SystemExit as end:  # argparse's way to end
        return int(end.code or 0)


def files(place: Path) -> set[Path]:
    """All but the locks of the cache, which hold nothing."""
    return {file for file in place.rglob("*") if file.is_file() and file.suffix != ".lock"}


def message(errors: str) -> str:
    """The one line on standard error; a command that read the corpus has shown its progress before."""
    said = [line for line in errors.splitlines() if "━" not in line]
    assert len(said) == 1, errors
    assert errors.endswith(said[0] + "\n")
    return said[0]


# -------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_helpful_line_and_leaves_nothing_behind(
    place: Path, mistake: str, capsys: Output, monkeypatch: Patch
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the mistake was not noticed before something is compiled")

    monkeypatch.setattr(build, "make_step", too_late)
    monkeypatch.setattr(loop, "init_state", too_late)
    monkeypatch.chdir(place)
    before = files(place)
    command, expected = MISTAKES[mistake]
    assert call(command) == 2
    output = capsys.readouterr()
    line = message(output.err)
    assert line.startswith("opus-jax")
    for part in expected:
        assert part in line
    assert output.out == ""
    assert files(place) == before


def test_a_changed_configuration_is_refused_with_its_keys(place: Path, run: Path, capsys: Output) -> None:
    before = files(place)
    assert call(f"train {place}/good.yaml selection.temperature=0.25 run.seed=7") == 2
    line = message(capsys.readouterr().err)
    assert "run.seed: 0 -> 7" in line
    assert "selection.temperature: 0.5 -> 0.25" in line
    assert "run.dir" in line
    assert files(place) == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.init_from={}/nowhere", "no checkpoint in"),
        ("model.init_from={}/run model.layers=2", "another one (blocks/attention/"),
        (
            "model.init_from={}/run tokenizer.kind=sentencepiece tokenizer.vocab_size=300",
            "another tokenizer",
        ),
        ("tracking.trackio=x", "pip install"),
    ],
)
def test_a_mistake_that_ends_a_run_at_once_does_not_bind_the_next(
    place: Path, run: Path, override: str, expected: str, capsys: Output, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, find=importlib.util.find_spec: None if name == "trackio" else find(name),
    )
    command = f"train {place}/good.yaml run.dir={place}/bound"
    assert call(f"{command} {override.format(place)}") == 2
    assert expected in message(capsys.readouterr().err)
    assert call(f"{command} selection.ratio=0.25 model.init_from={place}/nowhere") == 2
    assert "no checkpoint in" in message(capsys.readouterr().err)


def test_debug_shows_where_the_mistake_was_noticed(place: Path, capsys: Output) -> None:
    assert call(f"train {place}/good.yaml selection.ratio=0 --debug") == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "selection.ratio = 0.0" in errors.splitlines()[-1]


@pytest.mark.parametrize("arguments", ["train good.yaml selection.ratio=0", "fly"])
def test_as_a_program(place: Path, arguments: str) -> None:
    command = [sys.executable, "-m", "opus_jax", *arguments.split()]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert message(ended.stderr).startswith("opus-jax")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


# ------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_has_an_example_that_parses(command: str, capsys: Output) -> None:
    assert call(f"{command} --help") == 0
    text = " ".join(capsys.readouterr().out.split())
    found = re.search(r"example: opus-jax (.*)", text)
    assert found, text
    assert cli._parse(shlex.split(found[1])).command == (command or "train")


# ------------------------------------------------------------------------------------------------ work


def test_prepare_prints_the_folder(place: Path, capsys: Output) -> None:
    assert call(f"prepare {place}/good.yaml") == 0
    assert (Path(capsys.readouterr().out.strip()) / "manifest.json").is_file()


def test_train_says_what_was_reached_and_does_not_train_twice(place: Path, run: Path, capsys: Output) -> None:
    target = json.loads((run / "summary.json").read_text())["target_bits_per_byte"]
    assert call(f"train {place}/good.yaml") == 0
    reached, time = capsys.readouterr().out.splitlines()
    assert reached == f"{run}: 6 steps, target {target:.3f} bits per byte"
    assert time.startswith("time: ")


def test_evaluate_repeats_the_last_evaluation(run: Path, capsys: Output) -> None:
    assert call(f"evaluate {run}") == 0
    said, summary = json.loads(capsys.readouterr().out), json.loads((run / "summary.json").read_text())
    assert said["step"] == 6
    assert said["target_bits_per_byte"] == pytest.approx(summary["target_bits_per_byte"], rel=1e-6)
    assert said["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-6)


def test_generate_goes_on_from_the_prompt(run: Path, capsys: Output) -> None:
    texts = []
    for seed in (1, 1, 2):
        assert call(f'generate {run} --prompt "kato " --tokens 12 --seed {seed}') == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("kato ") for text in texts)
    assert texts[0] == texts[1] != texts[2]
    assert call(f"generate {run} --tokens 4 --temperature 0 --top-k 5") == 0


def test_report_prints_a_verdict_and_the_page(run: Path, capsys: Output) -> None:
    assert call(f"report {run} report.texts=false") == 0
    *verdict, page = capsys.readouterr().out.splitlines()
    assert verdict
    assert Path(page).read_text().startswith("<!DOCTYPE html>")
