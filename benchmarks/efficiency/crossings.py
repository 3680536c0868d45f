"""When a curve reaches a loss, and what was spent until then, against the reference arm."""

from collections.abc import Sequence
from typing import Any

SPENT = {"token_ratio": "update_tokens", "flop_ratio": "flops", "seen_ratio": "seen_tokens", "wall_ratio": "seconds"}
Curve = dict[str, list[float]]  # bits_per_byte, and what was spent: update_tokens, seen_tokens, flops, seconds


def crossing(spent: Sequence[float], bits: Sequence[float], threshold: float) -> float | None:
    """What was spent when `bits` first came down to `threshold`, linear between evaluations; None = never.

    A curve that begins at or below the threshold reached it somewhere before: its first evaluation counts.
    """
    for i, value in enumerate(bits):
        if value > threshold:
            continue
        if i == 0:
            return float(spent[0])
        share = (bits[i - 1] - threshold) / (bits[i - 1] - value)
        return float(spent[i - 1] + share * (spent[i] - spent[i - 1]))
    return None


def ratios(reference: Curve, curve: Curve) -> dict[str, float | None]:
    """What the reference spent in all over what the other spent until it had the reference's final loss."""
    threshold = reference["bits_per_byte"][-1]
    found: dict[str, float | None] = {}
    for name, kind in SPENT.items():
        reached = crossing(curve[kind], curve["bits_per_byte"], threshold)
        found[name] = reference[kind][-1] / reached if reached else None
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return (sum((x - mean) ** 2 for x in values) / (n - 1) / n) ** 0.5


def paired(first: dict[int, float], second: dict[int, float]) -> dict[str, Any]:
    """first - second for every seed that both have, their mean, its standard error and the number of seeds."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if not differences:
        return {"values": [], "mean": None, "standard_error": None, "n": 0}
    mean = sum(differences) / len(differences)
    return {
        "values": differences,
        "mean": mean,
        "standard_error": standard_error(differences),
        "n": len(differences),
    }
