"""The report of a run: one self-contained page that needs no network and runs no script but its own two.

All text that comes from a corpus, a file name or a configuration passes through `escape` (in the page) or
`chart.label` (in a chart). The content security policy names the hashes of the page's scripts, so that nothing else
could run even if some text slipped through.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from opus_jax.config import ReportConfig
from opus_jax.errors import UserError
from opus_jax.reports import choice_charts, result_charts
from opus_jax.reports.chart import Chart
from opus_jax.reports.examples import read_examples, records_folder
from opus_jax.reports.fragments import domain_table, escape, example_cards, run_table
from opus_jax.reports.run import Run, load_run, sibling
from opus_jax.reports.selection_reader import SelectionSummary
from opus_jax.reports.verdict import findings
from opus_jax.training.atomic import write_atomic

REPORT_FILE = "report.html"


def write_report(
    folder: str | Path, *, compare: Sequence[str | Path] = (), settings: ReportConfig | None = None
) -> Path:
    """Write `report.html` into a run folder, of a finished run or of one that is going on.

    Args:
      compare: run folders to show beside it, the first being the one it is judged against; none = the sibling
        folder with `-random` in its name, if there is one.
      settings: instead of the `report` section that the run was made with.

    Returns:
      The page.

    Raises:
      UserError: a folder is not a run, or one of its files is damaged.
    """
    run = load_run(folder)
    if settings is not None:
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, report=settings))
    beside = list(compare) or ([found] if (found := sibling(run)) else [])
    runs = _told_apart([run, *(load_run(path) for path in beside)])
    page = run.folder / REPORT_FILE
    write_atomic(page, _page(runs))
    return page


def _told_apart(runs: list[Run]) -> list[Run]:
    """Runs whose folders have equal names go by the names of their parents too."""
    names = [run.folder.name for run in runs]
    doubled = {name for name in names if names.count(name) > 1}
    return [
        dataclasses.replace(run, name=f"{run.folder.parent.name}/{run.name}") if run.name in doubled else run
        for run in runs
    ]


def _page(runs: list[Run]) -> str:
    run, baseline = runs[0], runs[1] if len(runs) > 1 else None
    summary = _selection_summary(run)
    bought = _drawn(result_charts.target_chart(runs), result_charts.loss_chart(runs), result_charts.domains_chart(runs))
    chosen = _choice_charts(run, summary)
    cost = _drawn(
        result_charts.audit_chart(run),
        result_charts.overhead_chart(runs),
        result_charts.speed_chart(runs),
        result_charts.wait_chart(runs),
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in findings(run, baseline))
    tables = run_table(runs) + domain_table(run, baseline, summary)
    body = [
        f'<header><h1>{escape(run.name)}</h1><p class="soft">{escape(_subtitle(run))}</p>',
        f'<section class="verdict" aria-label="Verdict">{lines}</section></header><main>',
        f'<section class="tables" aria-label="Summary">{tables}</section>',
        _section("What it reached", "", bought),
        _section("What was chosen", _choice_note(run, summary), chosen),
        _texts(run, summary),
        _section("How far to trust the scores, and their cost", "", cost),
        "</main>",
        f"<footer><details><summary>Configuration</summary><pre>{escape(_yaml(run))}</pre></details></footer>",
    ]
    return _document(f"{run.name}: opus-jax report", "\n".join(body), [*bought, *chosen, *cost])


def _selection_summary(run: Run) -> SelectionSummary | None:
    """None if there is no log, or nothing by which to read it yet."""
    if not (run.selection.exists and run.domains):
        return None
    first = run.config.selection.warm_start_steps + 1 if run.scores else None
    return run.selection.summarise(len(run.domains), run.steps, first_scored=first, extremes=run.config.report.examples)


def _choice_charts(run: Run, summary: SelectionSummary | None) -> list[Chart]:
    if summary is None:
        return []
    return _drawn(
        choice_charts.share_chart(run, summary),
        choice_charts.utility_chart(run, summary),
        choice_charts.utility_over_time_chart(run, summary),
        choice_charts.preference_chart(run, summary),
        choice_charts.spread_chart(run),
    )


def _choice_note(run: Run, summary: SelectionSummary | None) -> str:
    if run.method == "none":
        return "Method none trains on every row it reads; there was nothing to choose."
    if summary is None:
        return "There is no selection log (tracking.selection_log is false, or no step has been saved yet)."
    if not run.scores:
        return "Rows were chosen at random, so they have no utilities."
    warm = run.config.selection.warm_start_steps
    return f"The first {warm} steps chose at random (warm start)." if warm else ""


def _texts(run: Run, summary: SelectionSummary | None) -> str:
    heading, what = "Texts of highest and lowest utility", "utility"
    if run.method == "high_loss":
        heading, what = "Texts of highest and lowest loss", "loss"
    if not run.config.report.texts:
        return _section(heading, "Left out, as report.texts = false asks.", [])
    if summary is None or not summary.highest:
        return ""
    try:
        records = records_folder(run)
        highest, lowest = read_examples(records, summary.highest), read_examples(records, summary.lowest)
    except (UserError, IndexError) as error:
        return _section(heading, f"The texts cannot be shown: {error}", [])
    note = (
        "Rows as the model read them; a dashed line is a document's boundary. z: how many standard deviations above "
        "the mean of its buffer. Every text keeps the licence of its source."
    )
    cards = example_cards(f"Highest {what}", highest, run.domains) + example_cards(
        f"Lowest {what}", lowest, run.domains
    )
    return _section(heading, note, [], f'<div class="texts">{cards}</div>')


# ------------------------------------------------------------------------------------------------ markup


def _drawn(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _section(heading: str, note: str, charts: list[Chart], content: str = "") -> str:
    if not (charts or note or content):
        return ""
    drawn = f'<div class="charts">{"".join(map(_figure, charts))}</div>' if charts else ""
    return f'<section><h2>{escape(heading)}</h2><p class="soft">{escape(note)}</p>{content}{drawn}</section>'


def _figure(chart: Chart) -> str:
    buttons = "".join(_button(chart.id, name, pressed=i == 0) for i, name in enumerate(chart.axes or {}))
    axes = f'<div class="axes" role="group" aria-label="Horizontal axis">{buttons}</div>' if buttons else ""
    # The caption of a chart was made for plotly, so it is escaped already.
    return (
        f'<figure class="{"wide" if chart.wide else ""}"><h3>{escape(chart.title)}</h3>'
        f"<figcaption>{chart.caption}</figcaption>{axes}"
        f'<div class="plot" id="plot-{chart.id}" role="img" aria-label="{escape(chart.title)}"></div></figure>'
    )


def _button(chart: str, name: str, pressed: bool) -> str:
    return f'<button type="button" data-chart="{chart}" aria-pressed="{str(pressed).lower()}">{escape(name)}</button>'


def _document(title: str, body: str, charts: list[Chart]) -> str:
    style, script = (files("opus_jax.reports").joinpath(name).read_text() for name in ("page.css", "page.js"))
    plotly = get_plotlyjs()
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<noscript><p>The charts of this page need JavaScript; tables and texts do not.</p></noscript>
{body}
<script type="application/json" id="charts">{_json([_data(chart) for chart in charts])}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data(chart: Chart) -> dict[str, Any]:
    figure = chart.figure.to_plotly_json()
    figure["layout"].pop("template", None)
    return {"id": chart.id, "figure": figure, "axes": chart.axes}


def _json(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, cls=PlotlyJSONEncoder)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _subtitle(run: Run) -> str:
    config = run.config
    return (
        f"{config.selection.method} on {config.corpus.name}, {config.model.preset or 'own model'}, "
        f"{config.optimizer.name}, seed {config.run.seed}"
    )


def _yaml(run: Run) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(run.config.to_mapping()))
