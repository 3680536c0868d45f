"""Scoring a corpus with a real run: the utilities are the right ones, planted documents fall to the bottom, a killed
scoring ends as if nothing had happened, and every mistake is one line that helps."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_runs import small_config, write_text

from opus_jax import cli
from opus_jax.config import Config
from opus_jax.data.records import Manifest, batch_of
from opus_jax.distributed.axes import partition_spec
from opus_jax.errors import ConfigError, UserError
from opus_jax.influence import per_example
from opus_jax.models.loss import batch_loss, row_losses
from opus_jax.optim.preconditioner import direction
from opus_jax.training import score_corpus as scoring
from opus_jax.training import score_direction, score_files
from opus_jax.training.build import build
from opus_jax.training.checkpoint import Checkpoints, load_state
from opus_jax.training.loop import train
from opus_jax.training.score_corpus import score_corpus
from opus_jax.training.state import init_state

PART = 64  # rows
NOISE = ("corpus.noise.prose=characters:0.3", "corpus.noise.verse=boilerplate:0.3")
UNFINISHED = "40.orbax-checkpoint-tmp-1"  # of a trainer that goes on while the run is scored


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled_once(root: Path) -> Iterator[None]:
    """Every scoring compiles the same programs: they are kept for the next one, and for the child."""
    asked = {"jax_compilation_cache_dir": str(root / "compiled"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in asked}
    for settings in (asked, before):
        compilation_cache.reset_cache()
        for name, value in settings.items():
            jax.config.update(name, value)
        if settings is asked:
            yield


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """Trained shortly towards prose, on prose and verse with corrupted documents among them, and noise."""
    steps = ("run.steps=20", "run.eval_every=20", "run.save_every=20")
    once = ("selection.warm_start_steps=20", "selection.audit_every=0", "model.vocab_size=320")
    train(small_config(root, *NOISE, *steps, *once), progress=False)
    (root / "run" / "checkpoints" / UNFINISHED).mkdir()
    return root / "run"


@pytest.fixture(scope="module")
def scored(root: Path, run: Path) -> dict[str, Any]:
    return score(run, root / "whole", planted=("noise",))


def score(run: Path, output: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    return score_corpus(run, overrides, output=output, **({"rows_per_part": PART, "progress": False} | options))


def rows_of(output: Path | str) -> dict[str, np.ndarray]:
    tables = [pq.read_table(file) for file in sorted(Path(output).glob("rows-*.parquet"))]
    names = ("example_id", "utility", "z", "target_tokens")
    return {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in names}


def documents_of(output: Path | str) -> list[dict[str, Any]]:
    return pq.read_table(Path(output) / "documents.parquet").to_pylist()


def contents(output: Path) -> dict[str, bytes]:
    files = (file for file in output.rglob("*") if file.is_file() and file.name not in ("lock", "roc.json"))
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def on_device(records: np.ndarray) -> dict[str, jax.Array]:
    batch = batch_of(records)
    return {name: jnp.asarray(batch[name]) for name in ("tokens", "segment_ids", "loss_mask")}


def copy_of(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name), ignore=shutil.ignore_patterns("scores")))


def untrained(config: Config) -> None:
    """A run folder that holds the first weights."""
    parts = build(config, progress=False)
    state = init_state(parts.spec, parts.optimizer, 0, parts.mesh, directed=False)
    meta = {"totals": {"loss_digest": ""}, "records": "", "tokenizer": parts.manifest.tokenizer_hash}
    with Checkpoints(Path(str(config.run.dir)) / "checkpoints", 1, False) as checkpoints:
        checkpoints.save(0, state, {}, meta)
    config.save(Path(str(config.run.dir)) / "config.yaml")


# ------------------------------------------------------------------------------------------------ the scores


def test_there_is_a_line_for_every_row_and_document(run: Path, scored: dict[str, Any]) -> None:
    records = build(Config.load(run), progress=False).records
    manifest, rows = Manifest.load(records), rows_of(scored["output"])
    assert rows["example_id"].tolist() == list(range(manifest.total_rows("train")))
    assert len(list(Path(scored["output"]).glob("rows-*"))) == -(-len(rows["z"]) // PART)
    assert rows["z"].mean() == pytest.approx(0, abs=1e-5)
    assert rows["z"].std() == pytest.approx(1, abs=1e-5)
    documents = documents_of(scored["output"])
    assert len(documents) == scored["documents"] == sum(manifest.documents["train"].values())
    sources = {line["source"] for line in documents if line["domain"] == "prose"}
    assert sources <= {f"prose/{i}.txt:1" for i in range(40)}
    assert {line["noise"] for line in documents} == {None, "characters", "boilerplate"}
    total = sum(line["tokens"] for line in documents)
    assert total == rows["target_tokens"].sum() == scored["target_tokens"]
    of_documents = sum(line["utility"] * line["tokens"] for line in documents)
    assert of_documents == pytest.approx((rows["utility"] * rows["target_tokens"]).sum(), rel=1e-4)
    assert not (Path(scored["output"]) / "parts").exists()


def test_relative_utilities_are_0_on_average_over_the_stream(run: Path, tmp_path: Path) -> None:
    """The stream's mean gradient, weighted by tokens, has no utility along the direction."""
    found = score(run, tmp_path / "relative", relative=True)
    assert found["direction"]["relative"]
    parts = build(Config.load(run), progress=False)
    _, state, _, _ = load_state(run, parts.abstract_state())
    rows = score_direction._drawn(parts, score_direction.STREAM_BATCHES * parts.config.batch.rows)
    stream = score_direction._gradient(parts, state, "train", rows, parts.config.batch.rows)
    plain, relative = (score_direction.score_direction(parts, state, relative=r)[0] for r in (False, True))
    along = lambda v: float(optax.tree.vdot(stream, v) / (optax.tree.norm(stream) * optax.tree.norm(v)))  # noqa: E731
    assert abs(along(relative)) < 1e-5 < 1e-3 < abs(along(plain))


def test_utilities_are_those_of_explicit_gradients_along_the_runs_direction(run: Path, scored: dict[str, Any]) -> None:
    parts = build(Config.load(run), progress=False)
    _, state, _, _ = load_state(run, parts.abstract_state())
    state, spec = jax.tree.map(jnp.asarray, jax.device_get(state)), parts.spec
    prose = on_device(parts.reader("proxy").read(np.arange(*parts.manifest.domain_starts("proxy")[1:3])))
    assert scored["direction"]["proxy_rows"] == len(prose["tokens"])
    chosen = np.array([0, 63, 64, 500, 1000])
    batch = on_device(parts.reader("train").read(chosen))

    @jax.jit
    def explicit(params: Any, opt_state: Any, reference: Any) -> Any:
        nats_and_tokens = lambda p: batch_loss(spec, p, prose)  # noqa: E731
        target = jax.grad(lambda p: nats_and_tokens(p)[0] / nats_and_tokens(p)[1])(params)
        v = direction(parts.optimizer, opt_state, params, reference, target)
        return per_example.utilities(lambda p, rows: row_losses(spec, p, rows), params, v, batch)

    exact = explicit(state.params, state.opt_state, state.reference_gradient)
    np.testing.assert_allclose(rows_of(scored["output"])["utility"][chosen], exact, rtol=2e-3, atol=1e-6)


def test_corrupted_and_planted_documents_fall_to_the_bottom(scored: dict[str, Any]) -> None:
    roc = json.loads((Path(scored["output"]) / "roc.json").read_text())
    assert roc == scored["roc"]
    assert roc["auc"] > 0.95
    assert roc["auc_within_domains"] > 0.95
    assert {name: found["auc"] > 0.9 for name, found in roc["transforms"].items()} == {
        "characters": True, "boilerplate": True, "domain noise": True,
    }  # fmt: skip
    documents = documents_of(scored["output"])
    lowest = sorted(documents, key=lambda line: line["utility"])[: roc["corrupted"]]
    assert np.mean([line["noise"] is not None or line["domain"] == "noise" for line in lowest]) > 0.9


def test_another_corpus_is_scored_with_the_runs_tokenizer_and_against_its_proxy(run: Path, tmp_path: Path) -> None:
    write_text(tmp_path / "given")
    dice = random.Random(5)
    (tmp_path / "given" / "toxic").mkdir()
    for i in range(30):
        (tmp_path / "given" / "toxic" / f"{i}.txt").write_text(" ".join(dice.choices(["zzzq!", "qqqxj@"], k=90)))
    shutil.rmtree(tmp_path / "given" / "prose")  # the run's target, and the domain of its noise
    found = score(run, tmp_path / "out", f"corpus.path={tmp_path / 'given'}", planted=("toxic", "noise"))
    assert {line["domain"] for line in documents_of(tmp_path / "out")} == {"verse", "noise", "toxic"}
    assert found["roc"]["auc"] > 0.95
    assert found["roc"]["auc_within_domains"] is None
    assert found["direction"]["proxy_domains"] == ["prose"]
    assert found["direction"]["proxy_records"] == found["run"]["records"] != found["corpus"]["records"]


def test_rows_are_split_over_all_devices_and_the_mesh_changes_nothing(
    run: Path, tmp_path: Path, scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = []

    def spy(batch: Any, mesh: Any, rows: int | None = None) -> Any:
        placed.append(put(batch, mesh, rows))
        return placed[-1]

    put = scoring.put_rows
    monkeypatch.setattr(scoring, "put_rows", spy)
    score(run, tmp_path / "out", "mesh.fsdp=4", "mesh.data=2")
    for batch in placed:
        assert batch["tokens"].sharding.spec == partition_spec(("batch", None))
        assert {shard.data.shape[0] for shard in batch["tokens"].addressable_shards} == {16 // 8}
    split, whole = rows_of(tmp_path / "out")["utility"], rows_of(scored["output"])["utility"]
    np.testing.assert_allclose(split, whole, rtol=2e-3, atol=1e-6)


def test_the_command_says_what_was_found_where_and_what_a_run_without_selection_lacks(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(small_config(root, "selection.method=none", *NOISE, run="plain"))
    ask = ["score", str(root / "plain"), "--split", "validation", "selection.derivative=difference"]
    assert cli.main([*ask, "--planted", "noise"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    output = root / "plain" / "scores" / "validation"
    found = json.loads((output / "scores.json").read_text())
    assert found["direction"]["reference_gradient"] == "the mean gradient of 8 training rows, as the run keeps none"
    assert found["direction"]["derivative"] == "difference"
    assert first == f"{output}: {found['rows']} rows, {found['documents']} documents, step 0"
    assert second.startswith("corrupted documents rank at the bottom: ROC AUC 1.000 +- 0.000 (")
    assert (output / "roc.json").exists()
    assert cli.main(ask) == 0
    assert capsys.readouterr().out == f"{first}\n"
    assert not (output / "roc.json").exists(), "there is no noise in validation text"


# -------------------------------------------------------------------------------------------- being stopped


def test_killed_in_the_middle_the_files_come_out_the_same(
    root: Path, run: Path, tmp_path: Path, scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"
    child = Path(__file__).with_name("scoring_child.py")
    command = [sys.executable, str(child), str(run), str(output), str(PART)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen(command, env=os.environ | cache, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(output.glob("parts/part-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    kept = {file.name: file.read_bytes() for file in output.glob("parts/part-*")}
    assert 3 <= len(kept) < 19
    assert not (output / "scores.json").exists()
    (output / "parts" / ".partial-abc").write_bytes(b"torn")

    written: list[str] = []
    write = score_files.write_part
    monkeypatch.setattr(score_files, "write_part", lambda file, *rest: (written.append(file.name), write(file, *rest)))
    score(run, output)
    assert len(written) == 19 - len(kept)
    assert not kept.keys() & set(written)
    assert contents(output) == contents(Path(scored["output"]))


def test_a_save_of_a_trainer_at_work_is_left_alone(run: Path, scored: dict[str, Any]) -> None:
    assert scored["run"]["step"] == 20
    assert (run / "checkpoints" / UNFINISHED).is_dir()


def test_what_is_finished_is_not_scored_again(
    run: Path, scored: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(Path(scored["output"]))
    monkeypatch.setattr(scoring, "score_direction", None)
    assert score(run, Path(scored["output"]), planted=("noise",)) == scored
    assert contents(Path(scored["output"])) == before


# ------------------------------------------------------------------------------------------------- mistakes


def test_a_changed_setting_is_refused_with_its_name_and_both_values(run: Path, scored: dict[str, Any]) -> None:
    output = Path(scored["output"])
    before = contents(output)
    with pytest.raises(UserError, match=r"other settings \(direction.mode: vjp -> identity\).*another --output"):
        score(run, output, "selection.direction=identity")
    with pytest.raises(UserError, match=r"corpus.split: train -> validation.*rows_per_part: 64 -> 32"):
        score(run, output, split="validation", rows_per_part=32)
    assert contents(output) == before


def test_a_run_without_a_checkpoint_is_said_before_anything_is_prepared(root: Path, tmp_path: Path) -> None:
    small_config(root, f"corpus.cache_dir={tmp_path / 'cache'}").save(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"no checkpoint in .*train the run first"):
        score(tmp_path, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpus.row_tokens=64", r"corpus.row_tokens = 64: must be 32, the length of the rows"),
        ("tokenizer.kind=sentencepiece", r"tokenizer.kind = 'sentencepiece': belongs to the checkpoint.*corpus\.\*"),
        ("optimizer.eps=1", r"optimizer.eps = 1.0: belongs to the checkpoint"),
        ("selection.method=random", r"selection.method = 'random': belongs to the checkpoint.*selection.direction"),
        ("selection.temprature=1", r"the nearest is selection.temperature"),
    ],
)
def test_what_belongs_to_the_checkpoint_cannot_be_changed(run: Path, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        score(run, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_other_than_the_runs_is_refused(run: Path, tmp_path: Path) -> None:
    changed = copy_of(run, "other-tokenizer")
    config = Config.load(changed, ["tokenizer.kind=sentencepiece", "tokenizer.vocab_size=320"])
    config.save(changed / "config.yaml")
    with pytest.raises(UserError, match=r"was trained with tokenizer \w+, but its corpus now gives \w+: restore"):
        score(changed, tmp_path / "out")


def test_an_unknown_split_or_domain_is_refused(run: Path, tmp_path: Path, scored: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--split test: must be one of train, validation, proxy"):
        score(run, tmp_path / "out", split="test")
    with pytest.raises(UserError, match="--planted toxic: there are documents of noise, prose, verse"):
        score(run, Path(scored["output"]), planted=("toxic",))


def test_a_folder_that_cannot_be_written_or_is_held_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write scores to .*file/out \(Not a directory\).*another --output"):
        score(run, tmp_path / "file" / "out")
    with (
        score_files.open_scores(tmp_path / "held", {}),
        pytest.raises(UserError, match=r"another process is writing scores to .*held: wait for it"),
    ):
        score(run, tmp_path / "held")
