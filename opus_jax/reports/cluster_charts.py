"""Charts of the clusters under the last plan: what scores say of them, and how their share of the stream changed."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from opus_jax.reports.chart import COLOURS, Chart, label, name_axes, rounded
from opus_jax.reports.decisions import ClusterPlan, Decision

EXTREMES = 6  # clusters at either end
WORDS = 26  # characters of a cluster's label: it stands beside its bar, on a telephone too
_GREY = "#8c8c8c"


def cluster_worth_chart(decisions: Sequence[Decision]) -> Chart | None:
    """The clusters of highest and lowest worth under the last plan, with standard errors."""
    known = [c for c in _last_clusters(decisions) if np.isfinite(c.worth.mean) and c.worth.scores > 0]
    if not known:
        return None
    ends = _ends(sorted(known, key=lambda c: c.worth.mean))
    errors = rounded(np.array([c.worth.standard_error for c in ends]))
    figure = go.Figure()
    figure.add_scatter(
        x=rounded(np.array([c.worth.mean for c in ends])), y=list(range(len(ends))), mode="markers",
        error_x={"type": "data", "array": errors, "thickness": 1.2, "width": 3, "color": _GREY},
        marker={"size": 8, "color": [COLOURS[0] if c.worth.mean >= 0 else COLOURS[1] for c in ends]},
        hovertext=[f"{_full_name(c)}: {c.worth.scores:.0f} scores, {c.rows} rows" for c in ends],
        hoverinfo="x+text",
    )  # fmt: skip
    figure.update_layout(showlegend=False)
    _name_clusters(figure, ends, "mean z-score")
    caption = f"{_which(ends, known)}Named by their most telling words; bars: one standard error each way."
    return Chart("cluster-worth", "Utility of the clusters", caption, figure)


def cluster_share_chart(decisions: Sequence[Decision]) -> Chart | None:
    """The clusters whose share of the stream changed most, at first and under the last plan."""
    changed = [c for c in _last_clusters(decisions) if c.share != c.base_share]
    if not changed:
        return None
    ends = _ends(sorted(changed, key=lambda c: -c.fall))
    figure = go.Figure()
    for what, colour, shares in (
        ("under the first plan", _GREY, [c.base_share for c in ends]),
        ("under the last plan", COLOURS[0], [c.share for c in ends]),
    ):
        figure.add_bar(
            x=rounded(100 * np.array(shares)), y=list(range(len(ends))), orientation="h", name=what,
            marker={"color": colour}, hovertext=[_full_name(c) for c in ends], hoverinfo="x+text",
        )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.25, hovermode="closest")
    _name_clusters(figure, ends, "% of the stream")
    caption = f"{_which(ends, changed)}Those at the top gained most of the stream, those at the bottom lost most."
    return Chart("cluster-share", "Share of the clusters", caption, figure)


def largest_falls(decisions: Sequence[Decision], count: int) -> list[ClusterPlan]:
    """Clusters that lost share of the stream between the first and the last plan, the largest loss first."""
    fallen = [c for c in _last_clusters(decisions) if c.fall > 0]
    return sorted(fallen, key=lambda c: -c.fall)[:count]


def _last_clusters(decisions: Sequence[Decision]) -> tuple[ClusterPlan, ...]:
    return decisions[-1].clusters if decisions else ()


def _ends(ordered: list[ClusterPlan]) -> list[ClusterPlan]:
    return ordered if len(ordered) <= 2 * EXTREMES else ordered[:EXTREMES] + ordered[-EXTREMES:]


def _which(shown: list[ClusterPlan], known: list[ClusterPlan]) -> str:
    return "" if len(shown) == len(known) else f"The {EXTREMES} highest and {EXTREMES} lowest of {len(known)}. "


def _full_name(cluster: ClusterPlan) -> str:
    return f"{label(cluster.label)} ({label(cluster.place)})"


def _name_clusters(figure: go.Figure, clusters: list[ClusterPlan], unit: str) -> None:
    """By place on a plain axis: names as values would merge where equal, and be read as numbers or dates."""
    name_axes(figure, unit, "")
    figure.update_yaxes(automargin=True, tickvals=list(range(len(clusters))))
    figure.update_yaxes(ticktext=[label(cluster.label, WORDS) for cluster in clusters])
