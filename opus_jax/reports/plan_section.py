"""The part of the report about plans: what the stream was told to offer, and what it stopped offering."""

import math

from opus_jax.data.records import Manifest
from opus_jax.errors import UserError
from opus_jax.reports import cluster_charts, plan_charts
from opus_jax.reports.chart import Chart, drawn
from opus_jax.reports.corpus import records_folder
from opus_jax.reports.decisions import Decision
from opus_jax.reports.examples import read_excerpts
from opus_jax.reports.fragments import cluster_table, excerpt_cards
from opus_jax.reports.numbers import percent
from opus_jax.reports.page import section
from opus_jax.reports.run import Run

CLUSTERS = 12  # of the table, at most


def plan_sections(run: Run, manifest: Manifest | None) -> tuple[str, list[Chart]]:
    """(markup, its charts); nothing for a run whose plan never changed."""
    if not run.decisions:
        return "", []
    charts = drawn(
        plan_charts.weights_chart(run.decisions, plan_charts.first_weights(run.config, manifest), run.steps),
        plan_charts.worth_chart(run.decisions),
        plan_charts.passes_chart(run.decisions, run.config.feedback.max_epochs),
        cluster_charts.cluster_worth_chart(run.decisions),
        cluster_charts.cluster_share_chart(run.decisions),
    )
    return section("What the stream offered", _note(run), charts) + _stopped(run, run.decisions[-1]), charts


def _note(run: Run) -> str:
    changes, last = len(run.decisions), run.decisions[-1]
    signal = "losses of trained rows" if last.kind == "odm" else "scores"
    times = "once" if changes == 1 else f"{changes} times"
    control = " As a control, scores were dealt out anew within a buffer." if run.config.feedback.shuffle else ""
    return (
        f"The {signal} so far decide what the stream offers next. The plan changed {times}; the last one holds after "
        f"step {last.step} and knows the {signal} up to step {last.utilities_until}.{control}"
    )


def _stopped(run: Run, last: Decision) -> str:
    falls = cluster_charts.largest_falls(run.decisions, CLUSTERS)
    note = _facts(last)
    table = cluster_table("Clusters that lost most of the stream", falls) if falls else ""
    texts = ""
    if last.stopped_examples and run.config.report.texts:
        try:
            found = last.stopped_examples[: run.config.report.examples]
            texts = excerpt_cards("Documents whose share fell most", read_excerpts(records_folder(run.folder), found))
        except UserError as error:
            note += f" The texts cannot be shown: {error}"
    elif last.stopped_examples:
        note += " Their texts are left out, as report.texts = false asks."
    return section("What the stream stopped offering", note, [], table + texts)


def _facts(last: Decision) -> str:
    facts = []
    if not math.isnan(last.share_top_tenth):
        share = percent(last.share_top_tenth)
        facts.append(f"Under the last plan, the tenth of rows with the highest priority gets {share} of the stream.")
    if last.scored:
        count = f"Of {last.scored:,} documents with scores, {last.stopped:,}"
        facts.append(f"{count} get less than a tenth of the share they began with.")
    return " ".join(facts)
