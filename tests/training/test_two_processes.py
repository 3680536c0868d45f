"""Whole runs in several processes of one machine: the same as in one, and resumed in another number of them."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from several_processes import ends, start, train
from small_runs import lines, small_config, write_text

from opus_jax.config import Config

pytestmark = pytest.mark.slow

STEERED = (
    "feedback.enabled=true", "feedback.window_steps=3", "feedback.clusters=4", "run.steps=16", "run.save_every=4",
    "checkpoint.keep=4", "checkpoint.best=false",
)  # fmt: skip
GAP = 1e-5  # between the last row chosen and the first left out: what rounding may turn around


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    return finished(root, 1, "alone")


@pytest.fixture(scope="module")
def two(root: Path) -> Path:
    return finished(root, 2, "two")


def finished(root: Path, count: int, name: str, *more: str) -> Path:
    """The folder of a run with feedback, trained to its end in so many processes."""
    train(small_config(root, *STEERED, *more, run=name), root, count)
    return root / name


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def candidates(run: Path) -> dict[str, np.ndarray]:
    """The selection log, by column."""
    return columns(pq.read_table(run / "selection").sort_by([("step", "ascending"), ("position", "ascending")]))


def columns(table: Any) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in table.column_names if name != "document_ids"}


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one(root: Path, alone: Path, two: Path, count: int) -> None:
    together = two if count == 2 else finished(root, count, "four")
    np.testing.assert_allclose(losses(together), losses(alone), rtol=1e-4)
    one, several = summary(alone), summary(together)
    for key in ("update_tokens", "seen_tokens", "flops", "selected_share", "batch_digest", "steps"):
        assert several[key] == one[key], key
    for domain, bits in one["bits_per_byte"].items():
        assert several["bits_per_byte"][domain] == pytest.approx(bits, rel=1e-4)
    assert sorted(os.listdir(together / "decisions")) == sorted(os.listdir(alone / "decisions"))


def test_the_logs_hold_all_rows_of_every_step_once(alone: Path, two: Path) -> None:
    """Each of two processes reads half of the tokens; what is logged is of the whole batch, by process 0 only."""
    mine, theirs = candidates(alone), candidates(two)
    for column in ("step", "position", "example_id", "domain_id", "selected"):
        assert mine[column].tolist() == theirs[column].tolist()
    audits = [[line.get("audit_rank_agreement") for line in lines(run)] for run in (alone, two)]
    assert sum(audit is not None for audit in audits[0]) > 0
    assert audits[0] == pytest.approx(audits[1], abs=1e-3)
    assert [line["step"] for line in lines(two) if "loss" in line] == list(range(1, 17))
    assert json.loads((two / "environment.json").read_text())["devices"]["processes"] == 2


def test_the_same_layout_gives_the_same_bits(root: Path, two: Path) -> None:
    again = finished(root, 2, "again")
    assert summary(again)["loss_digest"] == summary(two)["loss_digest"]
    assert losses(again) == losses(two)


def test_from_one_state_two_processes_choose_what_one_chooses(
    root: Path, alone: Path, two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed from the same checkpoint; a difference is forgiven where the scores of two rows are nearly equal."""
    runs = {}
    for count in (1, 2):
        run = cut_back(alone, root / f"from-8-in-{count}", 8)
        train(small_config(root, *STEERED, run=run.name), root, count)
        logged = candidates(run)
        runs[count] = {name: values[logged["step"] == 9] for name, values in logged.items()}
    np.testing.assert_allclose(runs[1]["utility"], runs[2]["utility"], rtol=1e-4, atol=1e-9)
    gap = gap_of_choice(runs[1]["z"], step=8, config=small_config(root))
    with capsys.disabled():
        print(f" [gap between the last chosen and the first left out: {gap:.3g}]", end="")
    assert runs[1]["selected"].tolist() == runs[2]["selected"].tolist() or gap < GAP


def gap_of_choice(z: np.ndarray, step: int, config: Config) -> float:
    """By how much the K-th noisy score of a buffer leads the next: the noise follows from the seed and the step."""
    run_key = jax.random.split(jax.random.key(config.run.seed))[1]
    sample_key = jax.random.split(jax.random.fold_in(run_key, step))[1]
    noisy = np.sort(z / config.selection.temperature + np.asarray(jax.random.gumbel(sample_key, z.shape)))[::-1]
    return float(noisy[config.batch.rows - 1] - noisy[config.batch.rows])


def cut_back(run: Path, copy: Path, step: int) -> Path:
    """A copy of a run as it was after the save of a step, but for its logs, which are ahead."""
    shutil.copytree(run, copy)
    (copy / "summary.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
            (copy / "checkpoints" / "integrity" / f"{folder.name}.json").unlink()
    return copy


def test_begun_by_two_resumed_by_one_and_then_by_four_the_batches_are_those_of_an_undisturbed_run(
    root: Path, two: Path
) -> None:
    first = cut_back(two, root / "then-one", 4)
    train(small_config(root, *STEERED, run=first.name), root, 1)
    second = cut_back(first, root / "then-four", 8)
    train(small_config(root, *STEERED, run=second.name), root, 4)
    assert summary(second)["batch_digest"] == summary(two)["batch_digest"]
    assert candidates(second)["example_id"].tolist() == candidates(two)["example_id"].tolist()
    np.testing.assert_allclose(losses(second), losses(two), rtol=1e-4)


def test_processes_that_share_rows_between_them_train_as_one(root: Path, alone: Path) -> None:
    """The model split over both processes: each holds half of every matrix and all rows."""
    split = finished(root, 2, "split", "mesh.tensor=2")
    assert summary(split)["batch_digest"] == summary(alone)["batch_digest"]
    np.testing.assert_allclose(losses(split), losses(alone), rtol=1e-4)


def test_evaluate_and_score_run_in_two_processes(root: Path, two: Path) -> None:
    said = {}
    for count in (1, 2):
        scores = root / f"scores-{count}"
        command = ("score", str(two), "--split", "validation", "--output", str(scores))
        for job, arguments in (("evaluate", ("evaluate", str(two))), ("score", command)):
            found = ends(start(count, "-m", "opus_jax", *arguments, compiled=root / "compiled"))
            assert [code for code, _, _ in found] == [0] * count, found
            outputs = [re.sub(r"(?m)^\[Gloo\].*\n", "", output) for _, output, _ in found]
            assert [bool(output) for output in outputs] == [True, False][:count], "process 0 speaks for all"
            said[job, count] = outputs[0]
    bits = {count: json.loads(said["evaluate", count])["bits_per_byte"] for count in (1, 2)}
    assert bits[1] == pytest.approx(bits[2], rel=1e-4)
    rows = {n: columns(pq.read_table(sorted((root / f"scores-{n}").glob("rows-*.parquet")))) for n in (1, 2)}
    assert rows[1]["example_id"].tolist() == rows[2]["example_id"].tolist()
    np.testing.assert_allclose(rows[1]["utility"], rows[2]["utility"], rtol=1e-3, atol=1e-7)


def test_what_one_process_cannot_do_ends_all_with_the_reason(root: Path, alone: Path) -> None:
    """Two processes on one machine: only process 0 looks whether another run holds the folder."""
    small_config(root, *STEERED, "run.seed=7", run="alone").save(root / "changed.yaml")
    found = ends(start(2, "-m", "opus_jax", "train", str(root / "changed.yaml")))
    assert [code for code, _, _ in found] == [2, 2], found
    assert all("run.seed: 0 -> 7" in error for _, _, error in found)


def test_a_process_with_another_configuration_is_refused(root: Path) -> None:
    configs = [small_config(root, *STEERED, f"run.seed={seed}", run="differs") for seed in (0, 1)]
    for process, config in enumerate(configs):
        config.save(root / f"differs-{process}.yaml")
    found = ends(start(2, "-m", "opus_jax", "train", str(root / "differs-{process}.yaml")))
    assert [code for code, _, _ in found] == [2, 2], found
    assert all("differ from process 0 in their configuration" in error for _, _, error in found)
