"""The part of the report about wall time: what it was spent on."""

import plotly.graph_objects as go

from opus_jax.reports.chart import COLOURS, Chart, name_axes, thin
from opus_jax.reports.fragments import time_table
from opus_jax.reports.numbers import duration
from opus_jax.reports.page import section
from opus_jax.reports.run import Run
from opus_jax.training.goodput import CATEGORIES

METRIC = "goodput_seconds"


def time_section(run: Run) -> tuple[str, list[Chart]]:
    """(markup, its charts); nothing for a run that did not log it."""
    seconds = spent(run)
    if not seconds:
        return "", []
    attempts = int((run.summary or {}).get("attempts", 1))
    starts = f", over {attempts} starts" if attempts > 1 else ""
    note = f"{duration(sum(seconds.values()))} of wall time{starts}. Compiling is counted apart wherever it happens."
    chart = _chart(run)
    return section("Where the time went", note, [chart], time_table(seconds)), [chart]


def spent(run: Run) -> dict[str, float]:
    """Seconds by category: of the summary, else of the last line that has them."""
    logged = {name: series.last or 0.0 for name, series in run.by_domain.get(METRIC, {}).items()}
    found = (run.summary or {}).get(METRIC) or logged
    return {category: float(found[category]) for category in CATEGORIES if category in found}


def _chart(run: Run) -> Chart:
    figure = go.Figure()
    for place, category in enumerate(CATEGORIES):
        series = run.by_domain.get(METRIC, {}).get(category)
        if series is None:
            continue
        steps, values = thin(series)
        style = {"color": COLOURS[place], "width": 0.5}
        figure.add_scatter(x=steps, y=values, name=_words(category), mode="lines", line=style, stackgroup="time")
    name_axes(figure, "step", "seconds")
    caption = "Seconds so far, stacked. A rise without a step is compiling, saving, evaluating or a restart."
    return Chart("time", "Wall time by what it was spent on", caption, figure, wide=True)


def _words(category: str) -> str:
    return category.replace("_", " ")
