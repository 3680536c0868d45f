"""Charts of the domains under the plans: what the stream offers of them, and what scores say of them."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from opus_jax.config import Config
from opus_jax.data.plan import initial_plan
from opus_jax.data.records import Manifest
from opus_jax.errors import UserError
from opus_jax.reports.chart import COLOURS, DOMAINS, Chart, label, name_axes, rounded
from opus_jax.reports.decisions import Decision

PLANS = 200  # of one chart, at most


def first_weights(config: Config, manifest: Manifest | None) -> dict[str, float]:
    """Shares of the domains under the first plan; empty where that is not known from settings and manifest alone."""
    if manifest is None or config.plan.importance is not None:
        return {}
    try:
        weights = initial_plan(manifest, config).domain_weights
    except UserError:
        return {}
    return dict(zip(manifest.domains, (weights / weights.sum()).tolist(), strict=True))


def weights_chart(decisions: Sequence[Decision], first: dict[str, float], last_step: int) -> Chart | None:
    """Share of the stream that each plan gives to every domain, stacked.

    Args:
      first: shares before the first change; left out unless it has the domains of the decisions.
      last_step: the last plan is drawn until here.
    """
    if not decisions:
        return None
    plans = [(d.step, {name: plan.weight for name, plan in d.domains.items()}) for d in _thinned(decisions)]
    if first.keys() == plans[0][1].keys() and plans[0][0] > 0:
        plans = [(0, first), *plans]
    plans.append((max(last_step, plans[-1][0]), plans[-1][1]))
    figure = go.Figure()
    for place, (name, members) in enumerate(_bands(decisions)):
        shares = [100 * sum(weights.get(member, 0.0) for member in members) for _, weights in plans]
        colour = COLOURS[place]
        figure.add_scatter(
            x=[step for step, _ in plans], y=rounded(np.array(shares)), name=name, mode="lines", stackgroup="share",
            line={"shape": "hv", "width": 0.5, "color": colour}, fillcolor=f"{colour}b0",
        )  # fmt: skip
    name_axes(figure, "step", "% of the stream")
    figure.update_yaxes(range=[0, 100])
    caption = "Share of the rows offered that each plan gives to a domain. What is trained on is chosen among them."
    return Chart("plan-weights", "Plan weights by domain", caption, figure, wide=True)


def worth_chart(decisions: Sequence[Decision]) -> Chart | None:
    """Estimated worth of every domain at each change of plan, with its standard error."""
    lines = {
        name: [(d.step, d.domains[name].worth) for d in _thinned(decisions) if name in d.domains]
        for name in _most_extreme(decisions)
    }
    figure = go.Figure()
    for place, (name, points) in enumerate(lines.items()):
        known = [(step, worth) for step, worth in points if np.isfinite(worth.mean)]
        if not known:
            continue
        errors = rounded(np.array([worth.standard_error for _, worth in known]))
        figure.add_scatter(
            x=[step for step, _ in known], y=rounded(np.array([worth.mean for _, worth in known])),
            error_y={"type": "data", "array": errors, "thickness": 1, "width": 2}, name=label(name),
            mode="lines+markers", line={"color": COLOURS[place], "width": 1.8}, marker={"size": 5},
        )  # fmt: skip
    if not figure.data:
        return None
    if decisions[-1].kind == "odm":
        name_axes(figure, "step from which the plan holds", "mean reward")
        return Chart("worth", "Reward of the domains", "Losses of trained rows, as each plan took them.", figure)
    name_axes(figure, "step from which the plan holds", "mean z-score")
    caption = "As estimated for each plan; bars: one standard error each way."
    return Chart("worth", "Utility of the domains", caption, figure)


def passes_chart(decisions: Sequence[Decision], limit: float | None) -> Chart | None:
    """Passes over every domain before each plan, against the most that is allowed."""
    figure = go.Figure()
    shown = _thinned(decisions)
    for place, name in enumerate(_most_repeated(decisions)):
        known = [(d.step, d.domains[name].epochs) for d in shown if name in d.domains]
        figure.add_scatter(
            x=[step for step, _ in known], y=rounded(np.array([passes for _, passes in known])), name=label(name),
            mode="lines", line={"color": COLOURS[place], "width": 1.8},
        )  # fmt: skip
    if not figure.data:
        return None
    if limit is not None:
        figure.add_hline(y=limit, line={"width": 1, "dash": "dot", "color": "#d1483b"})
    name_axes(figure, "step", "passes")
    figure.update_yaxes(rangemode="tozero")
    allowed = f" Dotted: the limit, {limit:g}." if limit is not None else ""
    caption = f"Passes of the stream over the rows of each domain so far.{allowed}"
    return Chart("passes", "Passes over the domains", caption, figure)


def _thinned(decisions: Sequence[Decision]) -> list[Decision]:
    """At most PLANS of them, the first and the last among them."""
    if len(decisions) <= PLANS:
        return list(decisions)
    return [decisions[int(i)] for i in np.linspace(0, len(decisions) - 1, PLANS)]


def _bands(decisions: Sequence[Decision]) -> list[tuple[str, list[str]]]:
    """(name to show, domains): every domain; of very many, those of the largest weights and the others together."""
    names = list(decisions[-1].domains)
    if len(names) <= DOMAINS:
        return [(label(name), [name]) for name in names]
    peak = {name: max(d.domains[name].weight for d in decisions if name in d.domains) for name in names}
    kept = set(sorted(names, key=lambda name: -peak[name])[: DOMAINS - 1])
    rest = [name for name in names if name not in kept]
    return [*((label(name), [name]) for name in names if name in kept), (f"{len(rest)} other domains", rest)]


def _most_extreme(decisions: Sequence[Decision]) -> list[str]:
    """Domains to show worths of: all; of very many, the highest and the lowest under the last plan."""
    if not decisions:
        return []
    last = decisions[-1].domains
    if len(last) <= DOMAINS:
        return list(last)
    order = sorted((name for name in last if np.isfinite(last[name].worth.mean)), key=lambda n: last[n].worth.mean)
    return order if len(order) <= DOMAINS else order[: DOMAINS // 2] + order[-(DOMAINS // 2) :]


def _most_repeated(decisions: Sequence[Decision]) -> list[str]:
    last = decisions[-1].domains if decisions else {}
    known = [name for name in last if np.isfinite(last[name].epochs)]
    kept = sorted(known, key=lambda name: -last[name].epochs)[:DOMAINS]
    return [name for name in known if name in kept]
