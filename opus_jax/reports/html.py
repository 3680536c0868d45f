"""The report of a run: one self-contained page.

All text that comes from a corpus, a file name or a configuration passes through `escape` (in the page) or
`chart.label` (in a chart).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from opus_jax.config import ReportConfig
from opus_jax.data.records import Manifest
from opus_jax.errors import UserError
from opus_jax.reports import choice_charts, result_charts
from opus_jax.reports.chart import Chart, drawn
from opus_jax.reports.corpus import manifest_of, records_folder
from opus_jax.reports.escape import escape
from opus_jax.reports.examples import read_examples
from opus_jax.reports.fragments import domain_table, example_cards, run_table
from opus_jax.reports.page import document, section
from opus_jax.reports.plan_section import plan_sections
from opus_jax.reports.run import Run, load_run, sibling
from opus_jax.reports.selection_reader import SelectionSummary
from opus_jax.reports.time_section import time_section
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
    manifest = manifest_of(run.folder)
    summary = _selection_summary(run, manifest)
    bought = drawn(result_charts.target_chart(runs), result_charts.loss_chart(runs), result_charts.domains_chart(runs))
    chosen = _choice_charts(run, summary)
    plans, offered = plan_sections(run, manifest)
    time, spent = time_section(run)
    cost = drawn(
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
        section("What it reached", "", bought),
        section("What was chosen", _choice_note(run, summary), chosen),
        plans,
        _texts(run, summary),
        section("How far to trust the scores, and their cost", "", cost),
        time,
        "</main>",
        f"<footer><details><summary>Configuration</summary><pre>{escape(_yaml(run))}</pre></details></footer>",
    ]
    return document(f"{run.name}: opus-jax report", "\n".join(body), [*bought, *chosen, *offered, *cost, *spent])


def _selection_summary(run: Run, manifest: Manifest | None) -> SelectionSummary | None:
    """None if there is no log, or nothing by which to read it yet."""
    if not (run.selection.exists and run.domains):
        return None
    first = run.config.selection.warm_start_steps + 1 if run.scores else None
    return run.selection.summarise(
        len(run.domains), run.steps, first_scored=first, extremes=run.config.report.examples,
        training_rows=manifest.total_rows("train") if manifest else None,
    )  # fmt: skip


def _choice_charts(run: Run, summary: SelectionSummary | None) -> list[Chart]:
    if summary is None:
        return []
    return drawn(
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
    if run.scores_are_losses:
        heading, what = "Texts of highest and lowest loss", "loss"
    if not run.config.report.texts:
        return section(heading, "Left out, as report.texts = false asks.", [])
    if summary is None or not summary.highest:
        return ""
    try:
        records = records_folder(run.folder)
        highest, lowest = read_examples(records, summary.highest), read_examples(records, summary.lowest)
    except (UserError, IndexError) as error:
        return section(heading, f"The texts cannot be shown: {error}", [])
    note = (
        "Rows as the model read them; a dashed line is a document's boundary. z: how many standard deviations above "
        "the mean of its buffer. Every text keeps the licence of its source."
    )
    if run.config.plan.proxy_rows_share:
        note += " Rows of the proxy, which this run also trained on, are left out."
    cards = example_cards(f"Highest {what}", highest, run.domains) + example_cards(
        f"Lowest {what}", lowest, run.domains
    )
    return section(heading, note, [], f'<div class="texts">{cards}</div>')


def _subtitle(run: Run) -> str:
    config = run.config
    return (
        f"{config.selection.method} on {config.corpus.name}, {config.model.preset or 'own model'}, "
        f"{config.optimizer.name}, seed {config.run.seed}"
    )


def _yaml(run: Run) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(run.config.to_mapping()))
