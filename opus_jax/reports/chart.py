"""What the charts of the report have in common: size, colours, labels, and the words around a figure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from opus_jax.reports.escape import escape
from opus_jax.reports.series import Series

POINTS = 400  # of one line, at most
DOMAINS = 10  # of one chart, at most
LABEL = 36  # characters of a name in a chart, at most

# Told apart by people with colour-blindness and on white as on black.
COLOURS = (
    "#3b82d6", "#e07b00", "#1a9e77", "#c8508f", "#8a6fd1", "#a68a00", "#2aa7b8", "#d1483b", "#6b8e23", "#8c8c8c",
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One figure with its words.

    Attributes:
      axes: other values for the horizontal axis, one list for each trace, by name; the page has a button for each.
      wide: spans the page instead of half of it.
    """

    id: str
    title: str
    caption: str
    figure: go.Figure
    axes: dict[str, list[list[float]]] | None = None
    wide: bool = False


def drawn(*charts: Chart | None) -> list[Chart]:
    """Those of the charts that have something to show."""
    return [chart for chart in charts if chart is not None]


def thin(series: Series, points: int = POINTS) -> tuple[np.ndarray, list[float]]:
    """(steps, values): at most `points` means over equal numbers of neighbours; NaN stays only where all are NaN."""
    if len(series.steps) <= points:
        return series.steps, rounded(series.values)
    starts = np.unique(np.linspace(0, len(series.steps), points, endpoint=False).astype(int))
    finite = np.isfinite(series.values)
    sums = np.add.reduceat(np.where(finite, series.values, 0.0), starts)
    return series.steps[starts], rounded(ratio(sums, np.add.reduceat(finite.astype(float), starts)))


def label(name: str, limit: int = LABEL) -> str:
    """A name as plotly shall show it: shortened, and its markup as plain characters (plotly reads some HTML)."""
    return escape(name if len(name) <= limit else name[: limit - 1] + "…")


def name_axes(figure: go.Figure, x: str, y: str) -> None:
    figure.update_xaxes(title={"text": x})
    figure.update_yaxes(title={"text": y})


def ratio(part: np.ndarray, whole: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, part / whole, np.nan)


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{x:.5g}") for x in values]
