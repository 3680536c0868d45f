"""Charts of what was chosen: shares of the domains, and the scores by which they were chosen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float64

from opus_jax.reports.chart import COLOURS, DOMAINS, Chart, label, name_axes, ratio, rounded, thin
from opus_jax.reports.run import Run
from opus_jax.reports.selection_reader import Z_EDGES, SelectionSummary
from opus_jax.reports.series import Series

BANDS = 4  # more of them hide each other


def share_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """Selected share of every domain over time, against the share offered."""
    figure = go.Figure()
    for place, group in enumerate(_largest(run.domains, summary.offered.sum(0))):
        style = {"color": COLOURS[place], "width": 2}
        for counts, dash, what in ((summary.selected, "solid", "selected"), (summary.offered, "dot", "offered")):
            y = rounded(100 * ratio(counts[:, group.ids].sum(1), counts.sum(1)))
            figure.add_scatter(
                x=summary.middles, y=y, mode="lines", line=style | {"dash": dash}, legendgroup=group.name,
                name=group.name if what == "selected" else f"{group.name}, offered", showlegend=what == "selected",
            )  # fmt: skip
    if not figure.data:
        return None
    name_axes(figure, "step", "% of rows")
    caption = "Solid: share of the rows trained on. Dotted, in the same colour: share of the rows offered."
    return Chart("share", "Selected share by domain", caption, figure, wide=True)


def preference_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """How often a row of each domain was taken, over how often a row was taken at all."""
    groups = _largest(run.domains, summary.offered.sum(0))
    if not groups:
        return None
    offered = np.array([summary.offered[:, g.ids].sum() for g in groups])
    selected = np.array([summary.selected[:, g.ids].sum() for g in groups])
    lift = ratio(ratio(selected, selected.sum()), ratio(offered, offered.sum()))
    order = np.argsort(lift)
    figure = go.Figure()
    figure.add_bar(
        x=rounded(lift[order]), y=[groups[i].name for i in order], orientation="h",
        marker={"color": [COLOURS[i] for i in order]}, text=[f"{lift[i]:.2f}" for i in order], textposition="auto",
    )  # fmt: skip
    figure.add_vline(x=1, line={"width": 1, "dash": "dot", "color": "#888"})
    name_axes(figure, "selected share / offered share", "")
    figure.update_layout(showlegend=False)
    figure.update_yaxes(automargin=True, type="category")
    return Chart("preference", "What was preferred", "Over the whole run; 1 = as often as it was offered.", figure)


def utility_chart(run: Run, summary: SelectionSummary) -> Chart | None:
    """Distribution of z-scored utilities by domain."""
    if not summary.z_counts.any():
        return None
    figure = go.Figure()
    middles = (Z_EDGES[:-1] + Z_EDGES[1:]) / 2
    for place, group in enumerate(_largest(run.domains, summary.offered.sum(0))):
        counts = summary.z_counts[:, group.ids].sum((0, 1))
        density = ratio(counts, counts.sum()) / np.diff(Z_EDGES)
        figure.add_scatter(
            x=middles, y=rounded(density), mode="lines", name=group.name, line={"color": COLOURS[place], "width": 2}
        )
    name_axes(figure, "utility, z-score within its buffer", "density")
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
        low, median, high = (rounded(z_quantile(counts, share)) for share in (0.25, 0.5, 0.75))
        colour = COLOURS[place]
        band = {"x": summary.middles, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
        if len(groups) <= BANDS:
            figure.add_scatter(y=low, legendgroup=group.name, **band)
            figure.add_scatter(y=high, legendgroup=group.name, fill="tonexty", fillcolor=f"{colour}22", **band)
        style = {"color": colour, "width": 2}
        figure.add_scatter(
            x=summary.middles, y=median, mode="lines", name=group.name, line=style, legendgroup=group.name
        )
    name_axes(figure, "step", "z-score")
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
    name_axes(figure, "step", "standard deviation")
    figure.update_layout(showlegend=False)
    figure.update_yaxes(type="log", tickformat="~g")
    caption = "Before the z-score. Where it falls towards 0, rows hardly differ and choosing among them buys little."
    return Chart("spread", f"Spread of the raw {'losses' if run.scores_are_losses else 'utilities'}", caption, figure)


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


def _score(run: Run) -> str:
    return "Loss of rows" if run.scores_are_losses else "Utility"
