"""Choosing every arm's settings on the development mix and seeds, once, with equal trials; then they are frozen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.efficiency.arms import ARMS, METHOD_ARMS, TRIALS, Settings, described
from benchmarks.efficiency.mixes import DEVELOPMENT
from benchmarks.efficiency.pool import BenchmarkError, Workplace, run_all
from benchmarks.efficiency.runs import Run, Scale, run_of

SEEDS = (1001,)  # development seeds: never those of the report
SETTINGS = ("in_pool",)  # one of the report's settings: the others are met with what was chosen here

Results = Mapping[Run, dict[str, Any] | None]


def tuning_runs(scale: Scale, arms: Sequence[str] = tuple(ARMS)) -> dict[tuple[str, int], list[Run]]:
    """(arm, trial) -> its runs, over the settings and the development seeds."""
    return {
        (arm, trial): [
            run_of(DEVELOPMENT.name, setting, arm, settings, seed, scale) for setting in SETTINGS for seed in SEEDS
        ]
        for arm in arms
        for trial, settings in enumerate(ARMS[arm].trials())
    }


def tune(scale: Scale, place: Workplace, file: Path) -> dict[str, Any]:
    """Make all trials and write them, with the choice, into `file`."""
    groups = tuning_runs(scale)
    # Trial by trial over all arms, so that a mistake in any arm is met early.
    ordered = [run for _, runs in sorted(groups.items(), key=lambda item: item[0][1]) for run in runs]
    result = decide(groups, run_all(ordered, place, may_diverge=True), scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def decide(groups: Mapping[tuple[str, int], Sequence[Run]], results: Results, scale: Scale) -> dict[str, Any]:
    """What the tuning file holds: every trial, and for each arm the one of the lowest mean final target loss.

    Raises:
      BenchmarkError: every trial of an arm diverged.
    """
    trials = [_trial(arm, runs, results) for (arm, _), runs in groups.items()]
    choice = {arm: _best(arm, trials) for arm in dict.fromkeys(arm for arm, _ in groups)}
    made = [result for runs in groups.values() for run in runs if (result := results[run]) is not None]
    return {
        "benchmark": "data_efficiency_tuning",
        "mix": DEVELOPMENT.name,
        "target": DEVELOPMENT.target,
        "settings": list(SETTINGS),
        "seeds": list(SEEDS),
        "steps": scale.steps,
        "trials_per_arm": TRIALS,
        "spent": {
            "runs": sum(map(len, groups.values())),
            "update_tokens": sum(result["update_tokens"] for result in made),
            "flops": sum(result["flops"] for result in made),
        },
        "best_of_ours": min((arm for arm in choice if arm in METHOD_ARMS), key=lambda arm: choice[arm]["mean_bpb"]),
        "choice": choice,
        "trials": trials,
        "arms": described(),
    }


def frozen_choice(file: Path) -> tuple[dict[str, Settings], str]:
    """(settings of every arm, the best of ours) as tuned before.

    Raises:
      BenchmarkError: not tuned yet, or among other arms or grids than those of the code.
    """
    how = "python -m benchmarks.data_efficiency --tune"
    if not file.is_file():
        raise BenchmarkError(f"{file} is absent: the settings of the arms are tuned first, by {how}")
    tuned = json.loads(file.read_text())
    now, then = described(), tuned["arms"]
    changed = [arm for arm in {**then, **now} if now.get(arm) != then.get(arm)]
    if changed:
        raise BenchmarkError(
            f"{file} was tuned with other arms or grids ({', '.join(changed)} differ): run {how} again"
        )
    choice = {arm: chosen["settings"] for arm, chosen in tuned["choice"].items()}
    return with_followers(choice), tuned["best_of_ours"]


def first_trials() -> dict[str, Settings]:
    """The first trial of every grid: for runs that are no measurement."""
    return with_followers({name: arm.trials()[0] for name, arm in ARMS.items() if arm.trials()})


def with_followers(choice: dict[str, Settings]) -> dict[str, Settings]:
    """Arms that take another's settings added, all in the order of the code."""
    return {name: choice[arm.settings_of or name] for name, arm in ARMS.items()}


def _trial(arm: str, runs: Sequence[Run], results: Results) -> dict[str, Any]:
    """One point of a grid; its mean is None where a run diverged."""
    bits: dict[str, list[float | None]] = {}
    for run in runs:
        result = results[run]
        bits.setdefault(run.setting, []).append(None if result is None else result["final_bpb"])
    known = [value for values in bits.values() for value in values]
    mean = None if None in known else fmean(value for value in known if value is not None)
    return {"arm": arm, "settings": dict(runs[0].trial), "mean_bpb": mean, "final_bpb": bits}


def _best(arm: str, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    good = [trial for trial in trials if trial["arm"] == arm and trial["mean_bpb"] is not None]
    if not good:
        raise BenchmarkError(f"every tuning trial of {arm} diverged: choose lower learning rates for its grid")
    best = min(good, key=lambda trial: trial["mean_bpb"])
    return {"settings": best["settings"], "mean_bpb": best["mean_bpb"]}
