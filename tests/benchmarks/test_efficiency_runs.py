"""Parts of the data_efficiency harness, without a worker: what is kept of a run, the protocol, the files."""

import io
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data_efficiency, harness
from benchmarks.efficiency import pool as pools
from benchmarks.efficiency import runs as run_module
from benchmarks.efficiency import tuning, worker
from benchmarks.efficiency.arms import ARMS, TARGET_SHARE
from benchmarks.efficiency.mixes import REPORT
from benchmarks.efficiency.pool import BenchmarkError, Workplace
from benchmarks.efficiency.runs import Run, Scale, keep, kept, run_of, sources_digest

SCALE = Scale(20, evaluations=4)


def _run(arm: str = "random", setting: str = "in_pool", **trial: Any) -> Run:
    return run_of("report", setting, arm, {"optimizer.learning_rate": 0.01} | trial, 5, SCALE)


# ------------------------------------------------------------------------------------------ configuration


def test_the_last_layer_of_settings_wins() -> None:
    scale = Scale(20, overrides=(("optimizer.learning_rate", 0.5),))
    assert run_of("report", "clean", "random", {"optimizer.learning_rate": 0.01}, 1, scale).config.optimizer == (
        run_of("report", "clean", "random", {"optimizer.learning_rate": 0.5}, 1, SCALE).config.optimizer
    )
    tuned = _run("high_loss", **{"selection.ratio": 0.25}).config
    assert tuned.candidates == 4 * tuned.batch.rows, "a trial is above the arm's own settings"


def test_the_oracle_s_weights_come_from_its_share_of_the_target() -> None:
    weights = _run("oracle", **{TARGET_SHARE: 0.7}).config.corpus.weights
    assert weights[REPORT.target] == 0.7
    assert set(weights) == {REPORT.target, *REPORT.related}
    absent = _run("oracle", "absent", **{TARGET_SHARE: 0.7}).config.corpus.weights
    assert absent[REPORT.target] == 0
    assert sum(absent.values()) == pytest.approx(1)


def test_evaluations_are_spread_over_the_run_and_the_end_is_saved() -> None:
    config = _run().config
    assert (config.run.eval_every, config.run.save_every) == (5, 20)
    assert config.checkpoint.keep == 1
    assert not config.tracking.tensorboard
    assert not config.tracking.selection_log


def test_names_are_readable_and_do_not_depend_on_the_folder() -> None:
    name = _run("dsir", "absent", **{"plan.keep": 0.3}).name
    assert name.startswith("report-absent-dsir-seed5-")
    assert name == _run("dsir", "absent", **{"plan.keep": 0.3}).name
    assert name != _run("dsir", "absent", **{"plan.keep": 0.1}).name


# ------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run folder whose updates took 100 tokens a second, evaluated twice."""
    plain = {"step": 1, "loss": 3.0, "update_tokens": 50, "seen_tokens": 100, "flops": 5}
    evaluated = [
        {"step": 2, "target_bits_per_byte": 4.0, "update_tokens": 100, "seen_tokens": 200, "flops": 10},
        {"step": 4, "target_bits_per_byte": 3.0, "update_tokens": 200, "seen_tokens": 400, "flops": 20},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [plain, *evaluated]))
    (tmp_path / "records.json").write_text(json.dumps({"folder": "somewhere"}))
    return tmp_path


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        "tokens_per_second": 100.0, "target_bits_per_byte": 3.0, "flops": 20, "update_tokens": 200,
        "wall_seconds": 9.0, "selected_share": {"few": 0.25, "many": 0.75, "none": 0.0},
    }  # fmt: skip


def test_a_curve_holds_what_was_spent_at_every_evaluation(
    finished: Path, summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"few": 10, "many": 1000, "none": 0}
    monkeypatch.setattr(run_module.Manifest, "load", lambda folder: Namespace(rows={"train": rows}))
    assert kept(finished) is None
    result = keep(finished, summary, _run().config)
    assert result["curve"] == {
        "update_tokens": [100, 200], "seen_tokens": [200, 400], "flops": [10, 20],
        "seconds": [1.0, 2.0], "bits_per_byte": [4.0, 3.0],
    }  # fmt: skip
    assert result["final_bpb"] == 3.0
    trained = 20 * _run().config.batch.rows
    assert result["epochs"] == pytest.approx(trained * 0.25 / 10), "of the domain that came most often"
    assert result["sources"] == sources_digest()
    assert kept(finished) == result


def test_a_run_without_timed_steps_has_no_wall_ratio() -> None:
    curve = {"update_tokens": [1.0], "seen_tokens": [1.0], "flops": [1.0], "seconds": [0.0], "bits_per_byte": [2.0]}
    assert data_efficiency.ratios(curve, curve)["wall_ratio"] is None
    assert data_efficiency.ratios(curve, curve)["token_ratio"] == 1


# --------------------------------------------------------------------------------------------- processes


def test_the_protocol_tells_of_dead_workers() -> None:
    sent, said = io.StringIO(), io.StringIO('{"result": {"final_bpb": 2.0}}\n')
    assert worker.ask(sent, said, {"folder": "x"}) == {"result": {"final_bpb": 2.0}}
    assert json.loads(sent.getvalue()) == {"folder": "x"}
    assert worker.ask(sent, said, {})["error"] == "WorkerDied"


def test_a_broken_pipe_is_a_dead_worker() -> None:
    class Broken(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    assert worker.ask(Broken(), io.StringIO(), {})["error"] == "WorkerDied"


def test_workers_have_one_thread_and_keep_what_they_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--given")
    plain = pools._environment(Workplace(tmp_path, workers=1))
    hasty = pools._environment(Workplace(tmp_path, workers=1, hasty=True))
    assert plain["OMP_NUM_THREADS"] == "1"
    assert plain["XLA_FLAGS"].split() == ["--given", "--xla_cpu_multi_thread_eigen=false"]
    assert pools.HASTE in hasty["XLA_FLAGS"]
    assert plain["JAX_COMPILATION_CACHE_DIR"] != hasty["JAX_COMPILATION_CACHE_DIR"]
    assert Path(plain["JAX_COMPILATION_CACHE_DIR"]).is_relative_to(tmp_path)
    assert "MALLOC_TRIM_THRESHOLD_" in plain
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ, "the parent's own stays as it was"


def test_runs_left_over_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_prepare_corpora", lambda runs: None)
    monkeypatch.setattr(pools._Pool, "_serve", lambda *_: None)
    with pytest.raises(BenchmarkError, match=rf"1 runs were not made, the first {_run().name}"):
        pools.run_all([_run()], Workplace(tmp_path, workers=1))


# ------------------------------------------------------------------------------------------------- files


def test_tuning_is_written_and_the_command_ends_with_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_all(runs: list[Run], place: Workplace, may_diverge: bool) -> dict[Run, Any]:
        assert may_diverge
        assert [run.arm for run in runs[: len(tuning.SETTINGS)]] == ["random"] * len(tuning.SETTINGS)
        return {run: {"final_bpb": 2.0, "update_tokens": 1, "flops": 3} for run in runs}

    monkeypatch.setattr(tuning, "run_all", run_all)
    file = tmp_path / "below" / "tuning.json"
    data_efficiency.main(["--tune", "--quick", "--tuning", str(file), "--work", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "best of ours: " in printed
    assert all(arm in printed for arm in ARMS if ARMS[arm].settings_of is None)
    assert tuning.frozen_choice(file)[0]["random"] == ARMS["random"].trials()[0]


def test_the_full_run_asks_for_tuning_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"data_efficiency: .*absent.*--tune"):
        data_efficiency.main(["--tuning", str(tmp_path / "none.json"), "--work", str(tmp_path)])


def test_long_lists_of_numbers_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = [round(1 / (i + 1), 4) for i in range(60)]
    args = Namespace(name="some", quick=True, json=tmp_path / "new" / "some.json")
    harness.report(args, {"curves": {"a": curve}, "few": [1, 2]}, {"x": [1.0, None]})
    text = args.json.read_text()
    assert json.loads(text)["setting"]["curves"]["a"] == curve
    assert max(map(len, text.splitlines())) > 300
    assert json.loads(text)["figures"]["x"]["mean"] is None
    assert "null" in capsys.readouterr().out


def test_paired_differences_are_to_the_best_of_ours_and_to_feedback() -> None:
    final = {"random": 3.0, "topk_p": 2.5, "feedback": 2.0}
    results = {"clean": {arm: {1: {"final_bpb": bits}, 2: {"final_bpb": bits}} for arm, bits in final.items()}}
    found = data_efficiency._paired(results, "topk_p")["clean"]
    assert set(found) == {"topk_p", "feedback"}
    assert found["topk_p"]["random"]["mean"] == 0.5
    assert found["feedback"]["random"] == {"values": [1.0, 1.0], "mean": 1.0, "standard_error": 0.0, "n": 2}
    assert set(found["topk_p"]) == {"random", "feedback"}
