"""What every benchmark shares: its command line, its JSON, and the timing of two things in turn."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from opus_jax.training.environment import describe_environment

Figures = dict[str, list[float | None]]


def run_benchmark(name: str, description: str, measure: Callable[[bool], tuple[dict[str, Any], Figures]]) -> None:
    """Parse `--quick` and `--json FILE`, measure, print a table and write the JSON.

    Args:
      measure: takes whether it is the quick run; returns the setting and, by key, the repetitions of each figure.
        A repetition that is None (never reached) makes the figure's mean null.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="the same figures in under 3 minutes, fewer repetitions")
    parser.add_argument("--json", type=Path, default=None, help="where to write the result")
    args = parser.parse_args()
    start = time.perf_counter()
    setting, figures = measure(args.quick)
    result = {
        "benchmark": name,
        "setting": {"quick": args.quick, "seconds": round(time.perf_counter() - start), **setting},
        "environment": _environment(),
        "figures": {key: summarise(values) for key, values in figures.items()},
    }
    for key, figure in result["figures"].items():
        print(f"{key:60} {_number(figure['mean']):>9} +- {_number(figure['sd']):>7}  (n = {figure['n']})")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


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


def _number(value: float | None) -> str:
    return "null" if value is None else f"{value:.4f}"
