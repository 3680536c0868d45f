"""How well utilities tell documents that are known to be bad from the others: the area under the ROC curve.

An area is the chance that a bad document has a lower utility than a good one, ties counted half: 1 if all bad ones
rank at the bottom, 0.5 if utilities know nothing of it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Shaped

from opus_jax.errors import UserError

CURVE_POINTS = 101


def document_roc(documents: Path, planted: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """Areas over documents.parquet, or None where no document is known to be bad, or none to be good.

    Args:
      documents: the table that scoring wrote.
      planted: domains all of whose documents are bad, besides those with a `noise`.

    Raises:
      UserError: there is no such domain among the documents.
    """
    table = pq.read_table(documents, columns=["domain", "utility", "noise"])
    utility, domain = table["utility"].to_numpy(), np.array(table["domain"].to_pylist(), object)
    kind = np.array(table["noise"].to_pylist(), object)
    for name in planted:
        if name not in domain:
            raise UserError(f"--planted {name}: there are documents of {', '.join(sorted(set(domain)))}")
        kind[domain == name] = f"domain {name}"
    finite = np.isfinite(utility)
    utility, domain, kind = utility[finite], domain[finite], kind[finite]
    bad = np.array([k is not None for k in kind], bool)
    if not bad.any() or bad.all():
        return None
    kinds = sorted(set(kind[bad]))
    return {
        **_area(utility, bad, ~bad),
        "auc_within_domains": _within(utility, domain, bad),
        "transforms": {name: _area(utility, kind == name, ~bad) for name in kinds},
        "curve": _curve(utility[bad], utility[~bad]),
    }


def area_under_curve(bad: Float[np.ndarray, " B"], good: Float[np.ndarray, " G"]) -> float:
    """P(bad < good) + P(bad = good) / 2."""
    good = np.sort(good)
    below, upto = np.searchsorted(good, bad, "left"), np.searchsorted(good, bad, "right")
    return float(np.mean(len(good) - (below + upto) / 2) / len(good))


def standard_error(area: float, bad: int, good: int) -> float:
    """Of an area over so many documents (Hanley and McNeil 1982)."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (bad - 1) * (q1 - area**2) + (good - 1) * (q2 - area**2)
    return float(np.sqrt(max(variance, 0) / (bad * good)))


def _area(utility: Any, bad: Bool[np.ndarray, " D"], good: Bool[np.ndarray, " D"]) -> dict[str, Any]:
    area, b, g = area_under_curve(utility[bad], utility[good]), int(bad.sum()), int(good.sum())
    return {"auc": area, "standard_error": standard_error(area, b, g), "corrupted": b, "clean": g}


def _within(utility: Any, domain: Shaped[np.ndarray, " D"], bad: Bool[np.ndarray, " D"]) -> float | None:
    """The area over pairs of one domain: what a domain's name does not tell. None where no domain has both."""
    total, pairs = 0.0, 0
    for name in sorted(set(domain)):
        here, count = domain == name, int((bad & (domain == name)).sum())
        weight = count * (int(here.sum()) - count)
        if weight:
            total, pairs = total + weight * area_under_curve(utility[here & bad], utility[here & ~bad]), pairs + weight
    return total / pairs if pairs else None


def _curve(bad: Float[np.ndarray, " B"], good: Float[np.ndarray, " G"]) -> list[list[float]]:
    """[share of the good documents thrown away, share of the bad ones caught] below a rising threshold."""
    shares = np.linspace(0, 1, CURVE_POINTS)
    thresholds = np.quantile(good, shares, method="inverted_cdf")
    caught = np.searchsorted(np.sort(bad), thresholds, "left") / len(bad)
    lost = np.searchsorted(np.sort(good), thresholds, "left") / len(good)
    points = [[float(x), float(y)] for x, y in zip(lost, caught, strict=True)]
    return [*points, [1.0, 1.0]]
