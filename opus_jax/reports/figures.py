"""The charts of the report. Every chart is small, however long the run: series are averaged into few points."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float64

from opus_jax.reports.run import Run, Series
from opus_jax.reports.selection_reader import Z_EDGES, SelectionSummary

POINTS = 400  # of one line, at most
DOMAINS = 10  # of one chart, at most
BANDS = 4  # more of them hide each other
LABEL = 36  # characters of a name in a chart, at most

# Told apart by people with colour-blindness and on white as on black.
COLOURS = ("#3b82d6", "#e07b00", "#1a9e77", "#c8508f", "#8a6fd1", "#a68a00", "#2aa7b8", "#d1483b", "#6b8e23", "#8c8c8c")
AXES = {"update tokens": "update_tokens", "seen tokens": "seen_tokens", "FLOPs": "flops"}


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


def target_chart(runs: Sequence[Run]) -> Chart | None:
    """Bits per byte of the target domains, of every run, against three budgets."""
    lines = [(label(run.name), run, run["target_bits_per_byte"]) for run in runs]
    caption = (
        f"Held-out text of {label(', '.join(runs[0].targets) or 'all domains', 120)}. Lower is better. This is the "
        "curve to compare runs by; FLOPs include what choosing cost."
    )
    return _budget_chart("target", "Target bits per byte", caption, "bits per byte", lines, markers=True)


def loss_chart(runs: Sequence[Run]) -> Chart | None:
    """Training loss of every run, against three budgets."""
    caption = (
        "Mean over the rows that each run chose for itself: a method that picks hard rows shows a higher loss. "
        "Judge runs by bits per byte of held-out text, not by this curve."
    )
    lines = [(label(run.name), run, run["loss"]) for run in runs]
    return _budget_chart("loss", "Training loss", caption, "nats per token", lines)


def domains_chart(runs: Sequence[Run]) -> Chart | None:
    """Bits per byte by domain over time; the first compared run is dashed."""
    figure = go.Figure()
    axes: dict[str, list[list[float]]] = {name: [] for name in AXES}
    names = [name for name in runs[0].domains if name in runs[0].by_domain.get("bits_per_byte", {})][:DOMAINS]
    for run, dash in zip(runs[:2], ("solid", "dot"), strict=False):
        for place, name in enumerate(names):
            series = run.by_domain.get("bits_per_byte", {}).get(name)
            if series is None:
                continue
            steps, values = thin(series)
            style = {"color": COLOURS[place], "dash": dash, "width": 2}
            shown = label(name) if run is runs[0] else f"{label(name)} ({label(run.name)})"
            figure.add_scatter(
                y=values, name=shown, line=style, mode="lines", legendgroup=label(name), showlegend=run is runs[0]
            )
            _add_axes(axes, run, steps)
    if not figure.data:
        return None
    compared = f" Dotted: {label(runs[1].name)}." if len(runs) > 1 else ""
    caption = f"Held-out text of every domain: what the choice gained here and gave up there.{compared}"
    return _with_axes(Chart("domains", "Bits per byte by domain", caption, figure, axes, wide=True), "bits per byte")


def share_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """Selected share of every domain over time, against the share offered."""
    figure = go.Figure()
    for place, group in enumerate(_largest(run.domains, summary.offered.sum(0))):
        style = {"color": COLOURS[place], "width": 2}
        for counts, dash, what in ((summary.selected, "solid", "selected"), (summary.offered, "dot", "offered")):
            y = _rounded(100 * _ratio(counts[:, group.ids].sum(1), counts.sum(1)))
            figure.add_scatter(
                x=summary.middles, y=y, mode="lines", line=style | {"dash": dash}, legendgroup=group.name,
                name=group.name if what == "selected" else f"{group.name}, offered", showlegend=what == "selected",
            )  # fmt: skip
    if not figure.data:
        return None
    _name_axes(figure, "step", "% of rows")
    caption = "Solid: share of the rows trained on. Dotted, in the same colour: share of the rows offered."
    return Chart("share", "Selected share by domain", caption, figure, wide=True)


def preference_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """How often a row of each domain was taken, over how often a row was taken at all."""
    groups = _largest(run.domains, summary.offered.sum(0))
    if not groups:
        return None
    offered = np.array([summary.offered[:, g.ids].sum() for g in groups])
    selected = np.array([summary.selected[:, g.ids].sum() for g in groups])
    lift = _ratio(_ratio(selected, selected.sum()), _ratio(offered, offered.sum()))
    order = np.argsort(lift)
    figure = go.Figure()
    figure.add_bar(
        x=_rounded(lift[order]), y=[groups[i].name for i in order], orientation="h",
        marker={"color": [COLOURS[i] for i in order]}, text=[f"{lift[i]:.2f}" for i in order], textposition="auto",
    )  # fmt: skip
    figure.add_vline(x=1, line={"width": 1, "dash": "dot", "color": "#888"})
    _name_axes(figure, "selected share / offered share", "")
    figure.update_layout(showlegend=False)
    figure.update_yaxes(automargin=True)
    return Chart("preference", "What was preferred", "Over the whole run; 1 = as often as it was offered.", figure)


def utility_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """Distribution of z-scored utilities by domain."""
    if not summary.z_counts.any():
        return None
    figure = go.Figure()
    middles = (Z_EDGES[:-1] + Z_EDGES[1:]) / 2
    for place, group in enumerate(_largest(run.domains, summary.offered.sum(0))):
        counts = summary.z_counts[:, group.ids].sum((0, 1))
        density = _ratio(counts, counts.sum()) / np.diff(Z_EDGES)
        figure.add_scatter(
            x=middles, y=_rounded(density), mode="lines", name=group.name, line={"color": COLOURS[place], "width": 2}
        )
    _name_axes(figure, "utility, z-score within its buffer", "density")
    caption = (
        "Further right = training on the row lowers the target loss more. Values beyond 4 are counted at the ends."
    )
    return Chart("utility", f"{_score(run)} by domain", caption, figure)


def utility_over_time_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """Median z-scored utility of every domain over time, with the middle half of its rows."""
    if not summary.z_counts.any():
        return None
    figure = go.Figure()
    groups = _largest(run.domains, summary.offered.sum(0))
    for place, group in enumerate(groups):
        counts = summary.z_counts[:, group.ids].sum(1)
        low, median, high = (_rounded(z_quantile(counts, share)) for share in (0.25, 0.5, 0.75))
        colour = COLOURS[place]
        band = {"x": summary.middles, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        if len(groups) <= BANDS:
            figure.add_scatter(y=low, legendgroup=group.name, **band)
            figure.add_scatter(y=high, legendgroup=group.name, fill="tonexty", fillcolor=f"{colour}22", **band)
        style = {"color": colour, "width": 2}
        figure.add_scatter(
            x=summary.middles, y=median, mode="lines", name=group.name, line=style, legendgroup=group.name
        )
    _name_axes(figure, "step", "z-score")
    what = "Median, and the middle half of the rows" if len(groups) <= BANDS else "Median"
    caption = f"{what}. A domain that crosses 0 has changed its worth as the model learnt."
    return Chart("utility-time", f"{_score(run)} over time", caption, figure)


def spread_chart(run: Run) -> Chart | None:
    """Standard deviation of the raw scores of a buffer, over time."""
    scored = run["utility_sd"].values > 0
    steps, values = thin(Series(run["utility_sd"].steps[scored], run["utility_sd"].values[scored]))
    if not len(steps):
        return None
    figure = go.Figure()
    figure.add_scatter(x=steps, y=values, mode="lines", line={"color": COLOURS[0], "width": 1.8})
    _name_axes(figure, "step", "standard deviation")
    figure.update_layout(showlegend=False)
    figure.update_yaxes(type="log", tickformat="~g")
    caption = "Before the z-score. Where it falls towards 0, rows hardly differ and choosing among them buys little."
    return Chart(
        "spread", f"Spread of the raw {'losses' if run.method == 'high_loss' else 'utilities'}", caption, figure
    )


def audit_chart(run: Run) -> Chart | None:
    """Rank agreement of the scores in use with exact per-example gradients."""
    steps, values = thin(run["audit_rank_agreement"])
    if not len(steps):
        return None
    figure = go.Figure()
    figure.add_scatter(x=steps, y=values, mode="lines+markers", line={"color": COLOURS[0], "width": 1})
    figure.add_hline(y=0.8, line={"width": 1, "dash": "dot", "color": "#d1483b"})
    _name_axes(figure, "step", "Spearman")
    figure.update_layout(showlegend=False)
    figure.update_yaxes(range=[min(0.0, np.nanmin(values, initial=0.0)) - 0.05, 1.05])
    rows = run.config.selection.audit_rows
    caption = f"Scores in use against exact per-example gradients of whole rows, {rows} rows a time. Dotted: 0.8."
    return Chart("audit", "Rank agreement of the scores", caption, figure)


def speed_chart(runs: Sequence[Run]) -> Chart | None:
    lines = [(run, run["tokens_per_second"]) for run in runs]
    return _step_chart("speed", "Tokens trained per second", "The time of choosing included.", "tokens/s", lines)


def overhead_chart(runs: Sequence[Run]) -> Chart | None:
    lines = [(run, _scaled(run["scoring_overhead"], 100.0)) for run in runs if run.scores]
    caption = "FLOPs of scoring, proxy gradient and direction so far, over 3F per trained token."
    return _step_chart("overhead", "Scoring overhead", caption, "% of training FLOPs", lines)


def wait_chart(runs: Sequence[Run]) -> Chart | None:
    lines = [(run, _scaled(run["data_wait_seconds"], 1000.0)) for run in runs]
    return _step_chart("wait", "Waiting for data", "Time a step waited for rows from the host.", "ms per step", lines)


# ------------------------------------------------------------------------------------------------ parts


def thin(series: Series, points: int = POINTS) -> tuple[np.ndarray, list[float]]:
    """(steps, values): at most `points` means over equal numbers of neighbours; NaN stays only where all are NaN."""
    if len(series.steps) <= points:
        return series.steps, _rounded(series.values)
    starts = np.unique(np.linspace(0, len(series.steps), points, endpoint=False).astype(int))
    finite = np.isfinite(series.values)
    sums = np.add.reduceat(np.where(finite, series.values, 0.0), starts)
    return series.steps[starts], _rounded(_ratio(sums, np.add.reduceat(finite.astype(float), starts)))


def z_quantile(counts: np.ndarray, share: float) -> Float64[np.ndarray, " P"]:
    """Quantile of each period's z-scores from their histogram [P, Z], linear within a bin; NaN without scores."""
    total = counts.sum(1)
    cumulative = np.concatenate([np.zeros((len(counts), 1)), counts.cumsum(1)], axis=1)
    found = np.full(len(counts), np.nan)
    for i in np.flatnonzero(total):
        bin_ = min(int(np.searchsorted(cumulative[i], share * total[i], "right")) - 1, counts.shape[1] - 1)
        inside = (share * total[i] - cumulative[i, bin_]) / max(counts[i, bin_], 1)
        found[i] = Z_EDGES[bin_] + inside * (Z_EDGES[bin_ + 1] - Z_EDGES[bin_])
    return found


def label(name: str, limit: int = LABEL) -> str:
    """A name as plotly shall show it: shortened, and its markup as plain characters (plotly reads some HTML)."""
    return html.escape(name if len(name) <= limit else name[: limit - 1] + "…")


@dataclass(frozen=True)
class _Group:
    name: str
    ids: list[int]


def _largest(domains: Sequence[str], offered: np.ndarray) -> list[_Group]:
    """Every domain that was offered; of very many, the largest alone and the others together."""
    order = [int(i) for i in np.argsort(-offered, kind="stable") if offered[i] > 0]
    if len(order) <= DOMAINS:
        return [_Group(label(domains[i]), [i]) for i in sorted(order)]
    kept, rest = sorted(order[: DOMAINS - 1]), order[DOMAINS - 1 :]
    return [*(_Group(label(domains[i]), [i]) for i in kept), _Group(f"{len(rest)} other domains", rest)]


def _budget_chart(
    id: str, title: str, caption: str, unit: str, lines: list[tuple[str, Run, Series]], *, markers: bool = False
) -> Chart | None:
    figure = go.Figure()
    axes: dict[str, list[list[float]]] = {name: [] for name in AXES}
    for place, (name, run, series) in enumerate(lines):
        steps, values = thin(series)
        if not len(steps):
            continue
        style = {"color": COLOURS[place % len(COLOURS)], "width": 2.5 if place == 0 else 1.8}
        figure.add_scatter(y=values, name=name, mode="lines+markers" if markers else "lines", line=style)
        _add_axes(axes, run, steps)
    if not figure.data:
        return None
    return _with_axes(Chart(id, title, caption, figure, axes, wide=True), unit)


def _add_axes(axes: dict[str, list[list[float]]], run: Run, steps: np.ndarray) -> None:
    for name, metric in AXES.items():
        axes[name].append(run.at(metric, steps).tolist())


def _with_axes(chart: Chart, unit: str) -> Chart:
    assert chart.axes is not None
    first = next(iter(chart.axes))
    for trace, x in zip(chart.figure.data, chart.axes[first], strict=True):
        trace.x = x
    _name_axes(chart.figure, first, unit)
    return chart


def _step_chart(id: str, title: str, caption: str, unit: str, lines: list[tuple[Run, Series]]) -> Chart | None:
    figure = go.Figure()
    for place, (run, series) in enumerate(lines):
        steps, values = thin(series)
        if len(steps):
            style = {"color": COLOURS[place % len(COLOURS)], "width": 1.8}
            figure.add_scatter(x=steps, y=values, mode="lines", name=label(run.name), line=style)
    if not figure.data:
        return None
    _name_axes(figure, "step", unit)
    figure.update_yaxes(rangemode="tozero")
    return Chart(id, title, caption, figure)


def _name_axes(figure: go.Figure, x: str, y: str) -> None:
    figure.update_xaxes(title={"text": x})
    figure.update_yaxes(title={"text": y})


def _score(run: Run) -> str:
    return "Loss of rows" if run.method == "high_loss" else "Utility"


def _scaled(series: Series, factor: float) -> Series:
    return Series(series.steps, series.values * factor)


def _ratio(part: np.ndarray, whole: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(whole) > 0, part / whole, np.nan)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{x:.5g}") for x in values]
