"""What every benchmark shares: its command line, its JSON, and the timing of two things in turn."""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opus_jax.distributed.platform import choose_platform
from opus_jax.training.environment import describe_environment

Figures = dict[str, list[float | None]]

_LONG_LIST = re.compile(r"\[[\d\s.,eE+-]{200,}\]")  # of numbers, such as a curve


def run_benchmark(name: str, description: str, measure: Callable[[bool], tuple[dict[str, Any], Figures]]) -> None:
    """Parse `--quick` and `--json FILE`, measure, print a table and write the JSON.

    Args:
      measure: takes whether it is the quick run; returns the setting and, by key, the repetitions of each figure.
        A repetition that is None (never reached) makes the figure's mean null.
    """
    args = parser_of(name, description).parse_args()
    report(args, *measured(lambda: measure(args.quick)))


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """The command line that every benchmark has; one with options of its own adds them and calls `report` itself."""
    choose_platform()  # as commands do, before JAX starts
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="the same figures in under 3 minutes, fewer repetitions")
    parser.add_argument("--json", type=Path, default=None, help="where to write the result")
    parser.set_defaults(name=name)
    return parser


def measured(measure: Callable[[], tuple[dict[str, Any], Figures]]) -> tuple[dict[str, Any], Figures]:
    """What it returns, the seconds it took added to the setting."""
    start = time.perf_counter()
    setting, figures = measure()
    return {"seconds": round(time.perf_counter() - start), **setting}, figures


def report(args: argparse.Namespace, setting: dict[str, Any], figures: Figures) -> None:
    """Print the table and write the JSON where `--json` says."""
    result = {
        "benchmark": args.name,
        "setting": {"quick": args.quick, **setting},
        "environment": _environment(),
        "figures": {key: summarise(values) for key, values in figures.items()},
    }
    for key, figure in result["figures"].items():
        print(f"{key:60} {_number(figure['mean']):>9} +- {_number(figure['sd']):>7}  (n = {figure['n']})")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(_LONG_LIST.sub(_on_one_line, json.dumps(result, indent=1)) + "\n")


def summarise(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; null where a repetition is None."""
    values = list(values)
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return {"mean": None, "sd": None, "n": len(values), "values": values}
    sd = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": statistics.fmean(known), "sd": sd, "n": len(known), "values": known}


def alternate(first: Callable[[], None], second: Callable[[], None], pairs: int) -> list[float]:
    """Time two things in turn, A B B A A B ..., and return time(second) / time(first) of each pair."""
    ratios = []
    for pair in range(pairs):
        order = (first, second) if pair % 2 == 0 else (second, first)
        seconds = {action: _seconds(action) for action in order}
        ratios.append(seconds[second] / seconds[first])
    return ratios


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _environment() -> dict[str, Any]:
    """Versions and devices; where it was run and how it was called stay out of committed results."""
    known = describe_environment()
    machine = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    return machine | {key: known[key] for key in ("python", "packages", "devices")}


def _on_one_line(found: "re.Match[str]") -> str:
    return " ".join(found.group().split())


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"
