"""Charts of what runs reached and what they cost, several runs side by side."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go

from opus_jax.reports.chart import COLOURS, DOMAINS, Chart, label, name_axes, thin
from opus_jax.reports.run import Run
from opus_jax.reports.series import Series

AXES = {
    "update tokens": "update_tokens",
    "seen tokens": "seen_tokens",
    "FLOPs": "flops",
    "seconds": "seconds",
    "epochs": "epochs",
}


def target_chart(runs: Sequence[Run]) -> Chart | None:
    """Bits per byte of the target domains, of every run, against each budget."""
    lines = [(label(run.name), run, run["target_bits_per_byte"]) for run in runs]
    caption = (
        f"Held-out text of {label(', '.join(runs[0].targets) or 'all domains', 120)}. Lower is better. This is the "
        "curve to compare runs by. FLOPs include what choosing cost; seconds are those of steps, without evaluation "
        "and saving; epochs count what was read, trained on or not."
    )
    return _budget_chart("target", "Target bits per byte", caption, "bits per byte", lines, markers=True)


def loss_chart(runs: Sequence[Run]) -> Chart | None:
    """Training loss of every run, against each budget."""
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


def audit_chart(run: Run) -> Chart | None:
    """Rank agreement of the scores in use with exact per-example gradients."""
    steps, values = thin(run["audit_rank_agreement"])
    if not len(steps):
        return None
    figure = go.Figure()
    figure.add_scatter(x=steps, y=values, mode="lines+markers", line={"color": COLOURS[0], "width": 1})
    figure.add_hline(y=0.8, line={"width": 1, "dash": "dot", "color": "#d1483b"})
    name_axes(figure, "step", "Spearman")
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
    without = [trace.name for trace, x in zip(figure.data, axes["epochs"], strict=True) if not np.isfinite(x).any()]
    if without and len(without) < len(figure.data):
        caption += f" Epochs are unknown for {', '.join(without)}: the prepared corpus is not on this machine."
    return _with_axes(Chart(id, title, caption, figure, axes, wide=True), unit)


def _add_axes(axes: dict[str, list[list[float]]], run: Run, steps: np.ndarray) -> None:
    for name, metric in AXES.items():
        axes[name].append(run.at(metric, steps).tolist())


def _with_axes(chart: Chart, unit: str) -> Chart:
    assert chart.axes is not None
    first = next(iter(chart.axes))
    known = {name: xs for name, xs in chart.axes.items() if name == first or any(np.isfinite(x).any() for x in xs)}
    for trace, x in zip(chart.figure.data, known[first], strict=True):
        trace.x = x
    name_axes(chart.figure, first, unit)
    return replace(chart, axes=known)


def _step_chart(id: str, title: str, caption: str, unit: str, lines: list[tuple[Run, Series]]) -> Chart | None:
    figure = go.Figure()
    for place, (run, series) in enumerate(lines):
        steps, values = thin(series)
        if len(steps):
            style = {"color": COLOURS[place % len(COLOURS)], "width": 1.8}
            figure.add_scatter(x=steps, y=values, mode="lines", name=label(run.name), line=style)
    if not figure.data:
        return None
    name_axes(figure, "step", unit)
    figure.update_yaxes(rangemode="tozero")
    return Chart(id, title, caption, figure)


def _scaled(series: Series, factor: float) -> Series:
    return Series(series.steps, series.values * factor)
