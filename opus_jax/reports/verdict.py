"""What a run bought and what it cost, in three lines, against a run that chose at random. Honest when it lost."""

import dataclasses
from pathlib import Path

import numpy as np

from opus_jax.reports.numbers import percent, readable, times
from opus_jax.reports.run import Run, load_run, sibling
from opus_jax.reports.series import Series

SAME_BUDGET = 0.02  # update tokens that differ by less count as the same
EQUAL = 0.0005  # bits per byte that differ by less, in relative terms, count as equal
_DECIDES_CORPUS = ("name", "path", "domains", "noise", "max_bytes", "validation_share", "revision")


def verdict(run: Run, baseline: Run | str | Path | None = None) -> list[str]:
    """Three lines: what was trained, what it reached, what it cost.

    Args:
      baseline: the run to compare with, or its folder; None = the sibling folder with `-random` in its name.

    Raises:
      UserError: `baseline` is not a run folder.
    """
    other = baseline_of(run, baseline)
    first, *rest = findings(run, other)
    return [f"{first}; report: {_shown(run.folder / 'report.html')}", *rest]


def findings(run: Run, baseline: Run | None) -> list[str]:
    """The three lines, without the place of the report."""
    return [_trained(run), _reached(run, baseline), _cost(run, baseline)]


def baseline_of(run: Run, baseline: Run | str | Path | None = None) -> Run | None:
    """The run to compare with, if there is one."""
    if isinstance(baseline, Run):
        return baseline
    folder = baseline if baseline is not None else sibling(run)
    return load_run(folder) if folder is not None else None


def token_ratio(run: Run, baseline: Run) -> float | None:
    """The baseline's update tokens over those at which `run` first reaches the baseline's final target loss.

    The crossing is interpolated between evaluations. Above 1, `run` needs fewer tokens. None: never reached, or
    nothing to compare. A run that is below already at its first evaluation counts from there, so that the ratio is
    then a lower bound.
    """
    return _ratio_to_target(run, baseline, "update_tokens")


def flop_ratio(run: Run, baseline: Run) -> float | None:
    """As `token_ratio`, in FLOPs of all kinds: training, choosing and audits. Above 1, `run` needs fewer."""
    return _ratio_to_target(run, baseline, "flops")


def target(run: Run) -> Series:
    """Target bits per byte at every evaluation."""
    return run["target_bits_per_byte"]


def incomparable(run: Run, baseline: Run) -> str | None:
    """Why the target losses of two runs are not about the same text, or None."""
    corpora = [dataclasses.asdict(r.config.corpus) for r in (run, baseline)]
    different = [f"corpus.{key}" for key in _DECIDES_CORPUS if corpora[0][key] != corpora[1][key]]
    if sorted(run.targets) != sorted(baseline.targets):
        different.append("proxy.domains")
    return ", ".join(different) or None


# ------------------------------------------------------------------------------------------------ lines


def _trained(run: Run) -> str:
    size, tokens = run.total("parameters"), run.total("update_tokens")
    model = f"a model of {readable(size)} parameters" if size else "a model"
    so_far = "Trained" if run.summary else f"Unfinished, {run.steps} of {run.config.run.steps} steps: trained"
    how = "at random" if run.method == "random" else "without selection" if run.method == "none" else f"by {run.method}"
    read = f" on {readable(tokens)} tokens chosen {how}" if tokens else ""
    return f"{so_far} {model}{read}, {run.steps} steps"


def _reached(run: Run, baseline: Run | None) -> str:
    bits = target(run).last
    what = f"Target bits per byte ({_some(run.targets)})"
    if bits is None:
        return f"{what}: not evaluated yet"
    if baseline is None:
        return f"{what}: {bits:.4f}; no run to compare with (opus-jax report {run.name} --compare RUN)"
    their = target(baseline).last
    if their is None:
        return f"{what}: {bits:.4f}; {baseline.name} has not been evaluated yet"
    if different := incomparable(run, baseline):
        return f"{what}: {bits:.4f}; {baseline.name} has {their:.4f} on other text ({different}), not comparable"
    change = (bits - their) / their
    word = "equal" if abs(change) < EQUAL else f"{percent(abs(change))} {'better' if change < 0 else 'worse'}"
    against = f"{bits:.4f} against {their:.4f} of {baseline.name} {_budget(run, baseline)}"
    return f"{what}: {against}: {word}; {_crossing(run, baseline)}"


def _budget(run: Run, baseline: Run) -> str:
    ours, theirs = run.total("update_tokens"), baseline.total("update_tokens")
    if not ours or not theirs:
        return "(update tokens unknown)"
    if abs(ours / theirs - 1) < SAME_BUDGET:
        return "at the same update tokens"
    return f"(NOT the same update tokens: {readable(ours)} against {readable(theirs)})"


def _crossing(run: Run, baseline: Run) -> str:
    ratio = token_ratio(run, baseline)
    if ratio is None:
        return f"the final value of {baseline.name} was not reached"
    early = target(run).values[0] <= target(baseline).values[-1]
    # A decaying rate holds a run up in its middle, so its crossing comes later than at equal rates.
    decays = run.config.optimizer.schedule != "constant" and ratio > 1
    bound = "at most " if early or decays else ""
    reached = f"{bound}{percent(1 / ratio)} of its update tokens"
    flops = flop_ratio(run, baseline)
    total = f", FLOPs ratio {flops:.2f}" if flops is not None else ""
    return f"it reached that run's final value after {reached} (token ratio {ratio:.2f}{total})"


def _cost(run: Run, baseline: Run | None) -> str:
    overhead = run.total("scoring_overhead")
    scoring = f"choosing cost {percent(overhead)} of training" if overhead is not None else "cost of choosing unknown"
    flops, seconds = run.total("flops"), run.total("wall_seconds")
    if baseline is None:
        parts = [f"{readable(flops)} FLOPs" if flops else "", f"{seconds:,.0f} s" if seconds else "", scoring]
        return f"Cost: {', '.join(part for part in parts if part)}"
    ratios = [
        f"{times(mine / theirs)} the {what}"
        for what, mine, theirs in (
            ("FLOPs", flops, baseline.total("flops")),
            ("wall time", seconds, baseline.total("wall_seconds")),
        )
        if mine and theirs
    ]
    return f"Cost: {' and '.join(ratios) or 'not known yet'}{f' of {baseline.name}' if ratios else ''}; {scoring}"


def _ratio_to_target(run: Run, baseline: Run, budget: str) -> float | None:
    goal, reached = target(baseline), target(run)
    if not len(goal.values):
        return None
    below = np.flatnonzero(reached.values <= goal.values[-1])
    if not len(below):
        return None
    theirs = baseline.at(budget, goal.steps[-1:])[0]
    ours = _at_crossing(run.at(budget, reached.steps), reached.values, goal.values[-1], int(below[0]))
    return float(theirs / ours) if ours > 0 and np.isfinite(theirs) else None


def _at_crossing(spent: np.ndarray, bits: np.ndarray, goal: float, first: int) -> float:
    """What was spent where the line between the evaluations before and at `first` meets the goal."""
    if first == 0:
        return float(spent[0])
    share = (bits[first - 1] - goal) / (bits[first - 1] - bits[first])
    return float(spent[first - 1] + share * (spent[first] - spent[first - 1]))


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
