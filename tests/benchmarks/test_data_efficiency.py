"""data_efficiency: ratios against hand-made curves, equal and separate tuning, and a harness that loses no run."""

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from small_runs import mapping, write_text

from benchmarks import data_efficiency
from benchmarks.efficiency import pool as pools
from benchmarks.efficiency import runs as run_module
from benchmarks.efficiency import tuning
from benchmarks.efficiency.arms import ARMS, CLEAN_ARMS, METHOD_ARMS, TARGET_SHARE, TRIALS, described
from benchmarks.efficiency.crossings import crossing, paired, ratios
from benchmarks.efficiency.mixes import ALL_DOMAINS, DEVELOPMENT, MIXES, REPORT, SETTINGS, pool
from benchmarks.efficiency.pool import BenchmarkError, Workplace, run_all
from benchmarks.efficiency.runs import Run, Scale, kept, run_of
from opus_jax.config import from_mapping

SCALE = Scale(8)


# ------------------------------------------------------------------------------------------------- ratios


def test_a_crossing_is_interpolated_between_evaluations() -> None:
    spent, bits = [100, 200, 300], [4.0, 3.0, 2.0]
    assert crossing(spent, bits, 3.5) == 150
    assert crossing(spent, bits, 2.0) == 300
    assert crossing(spent, bits, 1.9) is None, "never reached"
    assert crossing(spent, bits, 5.0) == 100, "reached before the first evaluation: no earlier than that is claimed"
    assert crossing(spent, [4.0, 2.0, 3.5], 3.0) == 150, "the first crossing counts"


def test_ratios_are_the_reference_s_whole_over_what_was_needed() -> None:
    reference = _curve([4.0, 3.0, 2.5])
    other = _curve([3.0, 2.0, 1.0], flops=2.0, seen=4.0, seconds=3.0)
    found = ratios(reference, other)
    assert found == pytest.approx({"token_ratio": 2, "flop_ratio": 1, "seen_ratio": 0.5, "wall_ratio": 2 / 3})
    assert set(ratios(reference, reference).values()) == {1.0}
    assert set(ratios(reference, _curve([4.0, 3.0, 2.6])).values()) == {None}


def test_seeds_are_paired() -> None:
    first, second = {1: 3.0, 2: 4.0, 9: 100.0}, {1: 2.0, 2: 2.0}
    found = paired(first, second)
    assert found == {"values": [1.0, 2.0], "mean": 1.5, "standard_error": 0.5, "n": 2}
    assert paired({1: 1.0}, {2: 1.0})["mean"] is None


def test_figures_pair_every_arm_with_the_same_seed_of_random() -> None:
    curves = {
        "random": {1: _curve([4.0, 3.0]), 2: _curve([5.0, 4.0])},
        "feedback": {1: _curve([3.0, 2.0]), 2: _curve([4.5, 3.5])},
        "paper": {1: _curve([4.0, 3.0]), 2: _curve([5.0, 4.1])},
    }
    results = {"absent": {arm: {s: _result(c) for s, c in seeds.items()} for arm, seeds in curves.items()}}
    figures = data_efficiency.figures_of(results, "feedback")
    assert figures["token_ratio.absent.feedback"] == [2.0, pytest.approx(4 / 3)]
    assert figures["token_ratio.absent.paper"] == [1.0, None]
    assert figures["paired_bpb.absent.paper"] == pytest.approx([1.0, 0.6])
    assert "paired_bpb.absent.feedback" not in figures
    assert {key.split(".")[0] for key in figures} >= {"flop_ratio", "seen_ratio", "wall_ratio", "final_bpb", "epochs"}


def _curve(bits: list[float], flops: float = 1.0, seen: float = 1.0, seconds: float = 1.0) -> dict[str, list[float]]:
    tokens = [100.0 * (i + 1) * 2 / len(bits) for i in range(len(bits))]
    kinds = {"update_tokens": 1.0, "flops": flops, "seen_tokens": seen, "seconds": seconds}
    return {kind: [factor * t for t in tokens] for kind, factor in kinds.items()} | {"bits_per_byte": bits}


def _result(curve: dict[str, list[float]]) -> dict[str, Any]:
    return {"curve": curve, "final_bpb": curve["bits_per_byte"][-1], "epochs": 1.0, "wall_seconds": 2.0}


# ----------------------------------------------------------------------------------------- arms and mixes


def test_every_tuned_arm_has_the_same_number_of_different_trials() -> None:
    for name, arm in ARMS.items():
        trials = [json.dumps(trial, sort_keys=True) for trial in arm.trials()]
        assert len(set(trials)) == len(trials) == (0 if arm.settings_of else TRIALS), name
    followers = {name: arm.settings_of for name, arm in ARMS.items() if arm.settings_of}
    assert followers == {"feedback_shuffled": "feedback", "feedback_dsir_shuffled": "feedback_dsir"}


def test_method_arms_hold_no_control_and_no_rival() -> None:
    assert {"topk_p", "boltzmann", "lambda", "entropy", "feedback", "feedback_opus"} <= set(METHOD_ARMS)
    controls = {"random", "feedback_shuffled", "oracle", "paper"}
    rivals = {"topk_raw", "high_loss", "mid_loss", "greats", "dsir", "odm", "random_proxy_rows"}
    assert controls | rivals <= set(ARMS)
    assert not set(METHOD_ARMS) & (controls | rivals)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mix", [REPORT, DEVELOPMENT], ids=lambda mix: mix.name)
def test_half_of_a_pool_is_off_target(mix: Any, setting: str) -> None:
    weights = mix.weights(setting)
    assert sum(weights[name] for name in mix.off_target) == pytest.approx(0.5)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights[mix.target] == (0 if setting == "absent" else 1 / 8)
    oracle = mix.oracle_weights(setting, 0.5)
    assert sum(oracle.values()) == pytest.approx(1)
    assert not set(oracle) & set(mix.off_target)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_s_configuration_is_possible(arm: str) -> None:
    trial = tuning.first_trials()[arm]
    config = run_of("report", "absent", arm, trial, 3, SCALE).config
    assert config.proxy.domains == [REPORT.target]
    assert config.corpus.weights[REPORT.target] == 0
    assert (config.optimizer.schedule, config.run.seed, config.run.steps) == ("constant", 3, 8)
    plain = run_of("report", "absent", "random", tuning.first_trials()["random"], 3, SCALE).config
    for section in ("batch", "model", "evaluation", "run", "tokenizer"):
        assert getattr(config, section) == getattr(plain, section), "the same budget for all"
    key = ARMS[arm].knob
    if key not in (None, TARGET_SHARE):
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == trial[key]


def test_a_tenth_of_every_domain_is_noise_but_in_clean() -> None:
    assert pool(REPORT, "clean")["corpus"]["noise"] == {}
    for setting in ("in_pool", "absent"):
        noise = pool(REPORT, setting)["corpus"]["noise"]
        assert set(noise) == set(ALL_DOMAINS)
        assert all(value.endswith(":0.1") for value in noise.values())


def test_a_run_s_name_tells_configurations_apart() -> None:
    runs = [run for group in tuning.tuning_runs(SCALE, ["feedback", "oracle"]).values() for run in group]
    configs = {json.dumps(run.config.to_mapping()) for run in runs}
    assert len({run.name for run in runs}) == len(configs)
    assert len(runs) == 2 * TRIALS * len(tuning.SETTINGS)


# ------------------------------------------------------------------------------------------------- tuning


def test_tuning_sees_neither_the_report_s_mix_nor_its_seeds() -> None:
    runs = [run for group in tuning.tuning_runs(SCALE).values() for run in group]
    assert {run.mix for run in runs} == {"development"}
    assert not {run.seed for run in runs} & set(data_efficiency.SEEDS)
    for setting in SETTINGS:
        section = pool(DEVELOPMENT, setting)
        assert REPORT.target not in section["corpus"]["weights"]
        assert section["proxy"]["domains"] != [REPORT.target]
    per_arm = {arm: sum(a == arm for a, _ in tuning.tuning_runs(SCALE)) for arm, _ in tuning.tuning_runs(SCALE)}
    assert set(per_arm.values()) == {TRIALS}


def test_the_trial_with_the_lowest_mean_is_frozen(tmp_path: Path) -> None:
    file = _tuned(tmp_path, best=2)
    choice, ours = tuning.frozen_choice(file)
    assert list(choice) == list(ARMS)
    for arm in ARMS:
        if not ARMS[arm].settings_of:
            assert choice[arm] == ARMS[arm].trials()[2]
    assert choice["feedback_shuffled"] == choice["feedback"]
    assert ours in METHOD_ARMS
    tuned = json.loads(file.read_text())
    assert tuned["spent"]["runs"] == len(tuned["choice"]) * TRIALS * len(tuning.SETTINGS)
    assert len(tuned["trials"]) == len(tuned["choice"]) * TRIALS


def test_a_trial_that_diverged_is_not_chosen(tmp_path: Path) -> None:
    choice, _ = tuning.frozen_choice(_tuned(tmp_path, best=1, diverged=1))
    assert choice["random"] != ARMS["random"].trials()[1]


def test_a_choice_among_other_arms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"is absent.*--tune"):
        tuning.frozen_choice(tmp_path / "absent.json")
    file = _tuned(tmp_path, best=0)
    changed = json.loads(file.read_text())
    changed["arms"]["dsir"]["values"] = [0.9, 0.8]
    file.write_text(json.dumps(changed))
    with pytest.raises(BenchmarkError, match=r"\(dsir differ\).*--tune"):
        tuning.frozen_choice(file)


def _tuned(folder: Path, best: int, diverged: int | None = None) -> Path:
    groups = tuning.tuning_runs(SCALE)
    results: dict[Run, Any] = {}
    for (_, trial), runs in groups.items():
        for run in runs:
            result = {"final_bpb": 2.0 + abs(trial - best), "update_tokens": 10, "flops": 100}
            results[run] = None if trial == diverged and run.setting == tuning.SETTINGS[-1] else result
    file = folder / "tuning.json"
    file.write_text(json.dumps(tuning.decide(groups, results, SCALE)))
    return file


# --------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def small_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs on the small text corpus instead of `debian`: target prose."""
    write_text(tmp_path / "text")
    small = mapping(tmp_path)

    def configure(run: Run) -> Any:
        changed = small | {"run": {**small["run"], "dir": None, "steps": 8, "eval_every": 2, "seed": run.seed}}
        rate = dict(run.trial)["optimizer.learning_rate"]
        settings = [f"{key}={json.dumps(value)}" for key, value in ARMS[run.arm].settings.items()]
        return from_mapping(changed, [*settings, f"optimizer.learning_rate={rate}", "selection.audit_every=0"])

    monkeypatch.setattr(run_module, "configure", configure)
    return tmp_path / "work"


@pytest.mark.slow
def test_runs_are_made_once_and_then_read(small_pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, place = _run("random", 1), Workplace(small_pool, workers=1, hasty=True)
    found = run_all([run], place)
    curve = found[run]["curve"]
    assert len(curve["bits_per_byte"]) == 4
    assert curve["update_tokens"] == sorted(curve["update_tokens"])
    assert curve["bits_per_byte"][-1] == found[run]["final_bpb"]
    assert 0 < found[run]["epochs"] < 1
    assert "[  1/1] report clean" in capsys.readouterr().err
    assert run_all([run], place) == found
    assert "1 of them finished before" in capsys.readouterr().err
    _require_own_code(run, place)
    _require_failure_to_be_named(_run("random", 1, rate=1e30), place)


def _require_own_code(run: Run, place: Workplace) -> None:
    file = place.work / run.name / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sources": "other"}))
    with pytest.raises(BenchmarkError, match=r"1 finished runs .* other source code .*--reuse"):
        run_all([run], place)
    found = run_all([run], Workplace(place.work, workers=1, reuse=True))[run]
    assert found is not None
    assert found["sources"] == "other"


def _require_failure_to_be_named(bad: Run, place: Workplace) -> None:
    with pytest.raises(BenchmarkError, match=rf"{bad.name} failed \(NonFiniteLossError.*worker-0.log"):
        run_all([bad], place)
    assert kept(place.work / bad.name) is None


def test_only_a_trial_may_diverge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pools, "_prepare_corpora", lambda runs: None)
    monkeypatch.setattr(pools._Pool, "_start_process", lambda *_: Namespace(stdin=io.StringIO(), stdout=io.StringIO()))
    place, run = Workplace(tmp_path, workers=2), _run("random", 1)
    monkeypatch.setattr(pools, "ask", lambda *_: {"error": "NonFiniteLossError", "message": "too fast"})
    assert run_all([run, run], place, may_diverge=True) == {run: None}
    with pytest.raises(BenchmarkError, match=r"failed \(NonFiniteLossError: too fast\)"):
        run_all([run], place)
    monkeypatch.setattr(pools, "ask", lambda *_: {"error": "WorkerDied", "message": ""})
    with pytest.raises(BenchmarkError, match="WorkerDied"):
        run_all([run], place, may_diverge=True)


def _run(arm: str, seed: int, rate: float = 0.01) -> Run:
    return run_of("report", "clean", arm, {"optimizer.learning_rate": rate}, seed, SCALE)


def test_time_left_is_estimated_by_arm() -> None:
    runs = [_run("random", 1), _run("random", 2), _run("paper", 1), _run("paper", 2)]
    left = pools._Remaining(runs, workers=2)
    left.say(runs[0], "", 10)
    assert left.estimate() == pytest.approx(3 * 10 / 2)
    left.say(runs[2], "", 50)
    assert left.estimate() == pytest.approx((10 + 50) / 2)


# ------------------------------------------------------------------------------------------------ command


def test_a_part_never_takes_the_place_of_a_full_result(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    part = data_efficiency._parser().parse_args(["--arms", "feedback", "--json", str(file)])
    full = data_efficiency._parser().parse_args(["--json", str(file)])
    for there in ({"quick": False, "part": True}, {"quick": True, "part": False}):
        file.write_text(json.dumps({"setting": there}))
        data_efficiency.refuse_overwriting(part)
    file.write_text(json.dumps({"setting": {"quick": False, "part": False}}))
    data_efficiency.refuse_overwriting(full)
    with pytest.raises(BenchmarkError, match="full result"):
        data_efficiency.refuse_overwriting(part)


def test_unknown_arms_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data_efficiency._parser().parse_args(["--arms", "random,magic"])
    assert "random, topk_raw" in capsys.readouterr().err


def test_training_on_an_absent_target_is_an_error() -> None:
    leaked = {"selected_share": {REPORT.target: 0.1}}
    for arm in ("random_proxy_rows", "feedback"):
        run = run_of("report", "absent", arm, {"optimizer.learning_rate": 0.1}, 1, SCALE)
        if arm == "feedback":
            with pytest.raises(BenchmarkError, match="which is absent"):
                data_efficiency._require_absent_target(run, leaked)
        else:
            data_efficiency._require_absent_target(run, leaked)


def test_the_measured_setting_says_what_checks_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_efficiency, "run_all", lambda runs, place: {run: _full_result(run) for run in runs})
    arguments = ["--quick", "--tuning", str(_tuned(tmp_path, best=0))]
    args: Namespace = data_efficiency._parser().parse_args(arguments)
    setting, figures = data_efficiency.measure(args, Workplace(tmp_path, workers=1))
    assert setting["method_arms"] == METHOD_ARMS
    assert set(setting["settings_of_arms"]) == set(ARMS)
    assert setting["best_of_ours"] in METHOD_ARMS
    for key in ("token_ratio", "flop_ratio", "seen_ratio", "wall_ratio", "final_bpb"):
        for where in SETTINGS:
            arms = CLEAN_ARMS if where == "clean" else ARMS
            assert {name for name in figures if name.startswith(f"{key}.{where}.")} == {
                f"{key}.{where}.{arm}" for arm in arms
            }
    json.dumps(setting)
    assert described() == json.loads(json.dumps(described()))
    assert MIXES["report"] is REPORT


def _full_result(run: Run) -> dict[str, Any]:
    return _result(_curve([4.0, 3.0])) | {"selected_share": {}}
