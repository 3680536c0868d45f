"""How much less must be spent to reach random's final loss on the target: every arm, three pools, paired seeds.

`token_ratio`: update tokens of the random run over those of an arm when it first has random's final target loss,
interpolated between evaluations; `flop_ratio` (all FLOPs: training, scoring, proxy), `seen_ratio` and `wall_ratio`
(seconds in steps) likewise; null where it was never reached. All arms have the same number of steps and a constant
rate. Their settings are tuned on another mix and other seeds (`--tune`), with equal trials, and then frozen.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.efficiency.arms import ARMS, CLEAN_ARMS, METHOD_ARMS, REFERENCE
from benchmarks.efficiency.crossings import SPENT, paired, ratios
from benchmarks.efficiency.mixes import DEVELOPMENT, REPORT, SETTINGS
from benchmarks.efficiency.pool import BenchmarkError, Workplace, cores, run_all
from benchmarks.efficiency.runs import Run, Scale, run_of
from benchmarks.efficiency.tuning import SEEDS as DEVELOPMENT_SEEDS
from benchmarks.efficiency.tuning import first_trials, frozen_choice, tune
from benchmarks.harness import Figures, measured, parser_of, report
from opus_jax.errors import UserError

STEPS, TUNING_STEPS = 640, 240
SEEDS = (11, 12, 13, 14, 15)  # fresh: never used while arms and grids were made
TUNING_FILE = Path(__file__).parent / "results" / "data_efficiency_tuning.json"
FULL, TUNING = Scale(STEPS), Scale(TUNING_STEPS)
QUICK = Scale(
    steps=40,
    evaluations=8,
    overrides=(
        ("corpus.max_bytes", 400_000), ("corpus.validation_share", 0.1), ("corpus.proxy_share", 0.1),
        ("corpus.row_tokens", 32), ("tokenizer.vocab_size", 512),
        ("model.layers", 1), ("model.width", 32), ("model.hidden", 64), ("evaluation.rows", 8),
        ("selection.warm_start_steps", 4), ("feedback.window_steps", 5), ("feedback.clusters", 8),
    ),
)  # fmt: skip

Results = dict[str, dict[str, dict[int, dict[str, Any]]]]  # setting -> arm -> seed -> result


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    place = Workplace(args.work, args.workers, reuse=args.reuse, hasty=args.quick)
    try:
        if args.tune:
            _print_choice(tune(QUICK if args.quick else TUNING, place, args.tuning))
            return
        refuse_overwriting(args)
        report(args, *measured(lambda: measure(args, place)))
    except UserError as error:
        sys.exit(f"data_efficiency: {error}")


def _parser() -> ArgumentParser:
    parser = parser_of("data_efficiency", __doc__ or "")
    parser.add_argument("--tune", action="store_true", help="choose the arms' settings on the development mix, and end")
    parser.add_argument("--tuning", type=Path, default=TUNING_FILE, help="the file of the frozen choice")
    parser.add_argument("--work", type=Path, default=Path("runs/data_efficiency"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=len(cores()), help="runs at once (default: cores)")
    parser.add_argument("--reuse", action="store_true", help="read finished runs though the source code has changed")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=3, help="paired seeds")
    parser.add_argument("--arms", type=_names(ARMS), default=list(ARMS), help="some of them, with commas between")
    parser.add_argument("--settings", type=_names(SETTINGS), default=list(SETTINGS), help="likewise")
    return parser


def _names(known: Any) -> Any:
    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise ValueError(unknown)
        return [name for name in known if name in given]

    names.__name__ = f"list of names from {', '.join(known)}; got"
    return names


def refuse_overwriting(args: Namespace) -> None:
    """A part of the arms or settings, or a quick run, never takes the place of a full result.

    Raises:
      BenchmarkError: it would.
    """
    if args.json is None or not args.json.is_file() or not (args.quick or _is_part(args)):
        return
    there = json.loads(args.json.read_text())["setting"]
    if not (there["quick"] or there["part"]):
        raise BenchmarkError(f"{args.json} holds a full result, and this run is not: give another --json")


def _is_part(args: Namespace) -> bool:
    return args.arms != list(ARMS) or args.settings != list(SETTINGS)


# ---------------------------------------------------------------------------------------------- measuring


def measure(args: Namespace, place: Workplace) -> tuple[dict[str, Any], Figures]:
    """The setting and the figures, by key one value per seed."""
    scale, seeds = (QUICK, SEEDS[:1]) if args.quick else (FULL, SEEDS[: args.seeds])
    settings_of, best = _choice(args)
    arms = [arm for arm in ARMS if arm in args.arms or arm == REFERENCE]
    runs = {
        (setting, arm, seed): run_of(REPORT.name, setting, arm, settings_of[arm], seed, scale)
        for seed in seeds
        for setting in args.settings
        for arm in arms
        if setting != "clean" or arm in CLEAN_ARMS
    }
    made = run_all(list(runs.values()), place)
    results: Results = {}
    for (setting, arm, seed), run in runs.items():
        result = made[run]
        assert result is not None, run.name
        _require_absent_target(run, result)
        results.setdefault(setting, {}).setdefault(arm, {})[seed] = result
    setting = {
        "part": _is_part(args),
        "method_arms": [arm for arm in METHOD_ARMS if arm in arms],
        "best_of_ours": best,  # on the development mix
        "mix": {"target": REPORT.target, "related": REPORT.related, "off_target": REPORT.off_target},
        "steps": scale.steps,
        "evaluations": scale.evaluations,
        "seeds": list(seeds),
        "development": {"target": DEVELOPMENT.target, "seeds": list(DEVELOPMENT_SEEDS), "file": args.tuning.name},
        "settings_of_arms": {arm: settings_of[arm] for arm in arms},
        "workers": place.workers,
        "paired": _paired(results, best),
        "curves": _curves(results),
    }
    return setting, figures_of(results, best)


def _choice(args: Namespace) -> tuple[dict[str, Any], str]:
    if not args.quick:
        return frozen_choice(args.tuning)
    try:
        return frozen_choice(args.tuning)
    except BenchmarkError as error:
        print(f"{error}; meanwhile the first trial of every grid is taken", file=sys.stderr)
        return first_trials(), METHOD_ARMS[0]


def figures_of(results: Results, best: str) -> Figures:
    """Ratios, final losses, seconds, passes, and differences to the best of ours, by seed."""
    figures: Figures = {}
    for setting, arms in results.items():
        for arm, by_seed in arms.items():
            for seed, result in by_seed.items():
                values = ratios(arms[REFERENCE][seed]["curve"], result["curve"])
                values |= {"final_bpb": result["final_bpb"], "epochs": result["epochs"]}
                values |= {"wall_seconds": result["wall_seconds"]}
                if best in arms and arm != best:
                    values["paired_bpb"] = result["final_bpb"] - arms[best][seed]["final_bpb"]
                for name, value in values.items():
                    figures.setdefault(f"{name}.{setting}.{arm}", []).append(value)
    rank = {name: i for i, name in enumerate((*SPENT, "final_bpb", "paired_bpb", "epochs", "wall_seconds"))}
    return dict(sorted(figures.items(), key=lambda item: rank[item[0].split(".")[0]]))


def _paired(results: Results, best: str) -> dict[str, Any]:
    """Final losses of every arm less those of the best of ours, and of feedback, with standard errors."""
    final = {
        setting: {arm: {seed: result["final_bpb"] for seed, result in seeds.items()} for arm, seeds in arms.items()}
        for setting, arms in results.items()
    }
    return {
        setting: {
            base: {arm: paired(values, arms[base]) for arm, values in arms.items() if arm != base}
            for base in dict.fromkeys((best, "feedback"))
            if base in arms
        }
        for setting, arms in final.items()
    }


def _curves(results: Results) -> dict[str, Any]:
    """Update tokens, FLOPs and target bits per byte at every evaluation, rounded."""
    return {
        setting: {
            arm: {seed: _rounded(result["curve"]) for seed, result in seeds.items()} for arm, seeds in arms.items()
        }
        for setting, arms in results.items()
    }


def _rounded(curve: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {
        "update_tokens": list(curve["update_tokens"]),
        "flops": [float(f"{value:.5g}") for value in curve["flops"]],
        "bits_per_byte": [round(value, 4) for value in curve["bits_per_byte"]],
    }


def _require_absent_target(run: Run, result: Mapping[str, Any]) -> None:
    """Training on the target where it is absent would be a leak; only the proxy rows' own arm has some.

    Raises:
      BenchmarkError: the run trained on it.
    """
    share = result["selected_share"].get(REPORT.target, 0.0)
    if run.setting == "absent" and share > 0 and run.arm != "random_proxy_rows":
        raise BenchmarkError(f"run {run.name} trained on {REPORT.target} ({share:.3f} of its rows), which is absent")


def _print_choice(tuned: Mapping[str, Any]) -> None:
    for arm, chosen in tuned["choice"].items():
        print(f"{arm:20} {chosen['mean_bpb']:.4f} bpb  {json.dumps(chosen['settings'])}")
    print(f"best of ours: {tuned['best_of_ours']}; spent: {json.dumps(tuned['spent'])}")


if __name__ == "__main__":
    main()
