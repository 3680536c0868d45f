"""Tables and texts of the report. Whatever comes from outside is escaped here."""

import math
from collections.abc import Callable, Mapping, Sequence

from opus_jax.reports.decisions import ClusterPlan
from opus_jax.reports.escape import escape
from opus_jax.reports.examples import Example, Excerpt, Segment
from opus_jax.reports.numbers import duration, percent, readable
from opus_jax.reports.run import Run
from opus_jax.reports.selection_reader import SelectionSummary
from opus_jax.training.goodput import CATEGORIES, shares

TEXT_LIMIT = 6000  # characters of one text

_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "target_bits_per_byte": ("Target bits per byte", lambda x: f"{x:.4f}"),
    "update_tokens": ("Update tokens", readable),
    "seen_tokens": ("Seen tokens", readable),
    "flops": ("FLOPs", readable),
    "scoring_overhead": ("Scoring overhead", percent),
    "wall_seconds": ("Wall time", duration),
    "tokens_per_second": ("Tokens per second", readable),
    "parameters": ("Parameters", readable),
}


def run_table(runs: Sequence[Run]) -> str:
    """One column for each run."""
    rows = [
        ["Method", *(escape(run.method) for run in runs)],
        ["Steps", *(_steps(run) for run in runs)],
        *([name, *(_cell(run.total(key), show) for run in runs)] for key, (name, show) in _MEASURES.items()),
    ]
    return _table("Runs", ["", *(escape(run.name) for run in runs)], rows)


def domain_table(run: Run, baseline: Run | None, summary: SelectionSummary | None) -> str:
    """One row for each domain: what was reached there, and what was taken from there."""
    if not run.domains:
        return ""
    heads = ["Domain", "bits/byte", *(["change"] if baseline else []), *(["offered", "selected"] if summary else [])]
    rows = []
    for place, domain in enumerate(run.domains):
        bits = _bits(run, domain)
        row = [escape(domain) + (" (target)" if domain in run.targets else ""), _cell(bits, lambda x: f"{x:.4f}")]
        if baseline:
            row.append(_change(bits, _bits(baseline, domain)))
        if summary:
            row += [_share(counts.sum(0).tolist(), place) for counts in (summary.offered, summary.selected)]
        rows.append(row)
    against = f", change against {escape(baseline.name)}" if baseline else ""
    return _table(f"Domains{against}", heads, rows)


def time_table(seconds: Mapping[str, float]) -> str:
    """One row for each category of wall time."""
    parts = shares(seconds)
    rows = [
        [escape(name.replace("_", " ")), _cell(value, duration), _cell(parts[name], percent), escape(CATEGORIES[name])]
        for name, value in seconds.items()
    ]
    return _table("Wall time", ["Spent on", "time", "share", "what it is"], rows)


def example_cards(heading: str, examples: Sequence[Example], domains: Sequence[str]) -> str:
    """Texts, each with its domain, source, licence, utility and step."""
    return f"<div><h3>{escape(heading)}</h3>{''.join(_card(example, domains) for example in examples)}</div>"


def cluster_table(caption: str, clusters: Sequence[ClusterPlan]) -> str:
    """One row for each cluster: its words, its share of the stream at first and now, and what it is worth."""
    heads = ["Cluster", "rows", "share at first", "share now", "mean z-score"]
    rows = [
        [
            escape(f"{c.label} ({c.place})"), f"{c.rows:,}", percent(c.base_share), percent(c.share),
            _estimate(c.worth.mean, c.worth.standard_error),
        ]
        for c in clusters
    ]  # fmt: skip
    return _table(escape(caption), heads, rows)


def excerpt_cards(heading: str, excerpts: Sequence[Excerpt]) -> str:
    """Beginnings of documents, each with its domain, source, licence and what is left of its share."""
    cards = "".join(map(_excerpt_card, excerpts))
    return f'<h3 class="cards-heading">{escape(heading)}</h3><div class="cards">{cards}</div>'


def _excerpt_card(excerpt: Excerpt) -> str:
    stopped = excerpt.stopped
    facts = f"document {stopped.document_id}, now at {percent(stopped.share_ratio)} of its first share"
    return _article(stopped.domain, facts, _segment(excerpt.segment, first=True))


def _card(example: Example, domains: Sequence[str]) -> str:
    found = example.found
    fate = "trained on" if found.selected else "left out"
    facts = f"z {found.z:+.2f}, utility {found.utility:.3g}, step {found.step}, row {found.example_id}, {fate}"
    segments = "".join(_segment(segment, first=i == 0) for i, segment in enumerate(example.segments))
    return _article(domains[found.domain_id], facts, segments)


def _article(heading: str, facts: str, segments: str) -> str:
    """The segments are markup already."""
    return (
        f'<article><h4>{escape(heading)}</h4><p class="soft">{escape(facts)}</p>'
        f'<div class="segments" tabindex="0">{segments}</div></article>'
    )


def _segment(segment: Segment, first: bool) -> str:
    more = len(segment.text) - TEXT_LIMIT
    text = segment.text[:TEXT_LIMIT] + (f" … {more} more characters" if more > 0 else "")
    noise = f" · corrupted by {segment.noise}" if segment.noise else ""
    origin = f"{segment.source} · licence: {segment.licence}{noise}"
    return (
        f'<div class="{"" if first else "boundary"}"><p class="soft">{escape(origin)}</p>'
        f'<pre dir="auto" translate="no">{escape(text)}</pre></div>'
    )


def _table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    """Cells are markup already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="table" tabindex="0"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _steps(run: Run) -> str:
    asked = run.config.run.steps
    return str(asked) if run.summary else f"{run.steps} of {asked}"


def _bits(run: Run, domain: str) -> float | None:
    if run.summary and isinstance(values := run.summary.get("bits_per_byte"), dict):
        return values.get(domain)
    series = run.by_domain.get("bits_per_byte", {}).get(domain)
    return series.last if series else None


def _estimate(mean: float, error: float) -> str:
    if not math.isfinite(mean):
        return "–"
    return f"{mean:+.2f} ± {error:.2f}" if math.isfinite(error) else f"{mean:+.2f}"


def _share(counts: Sequence[int], place: int) -> str:
    return percent(counts[place] / sum(counts)) if sum(counts) else "–"


def _change(ours: float | None, theirs: float | None) -> str:
    if ours is None or not theirs:
        return "–"
    change = (ours - theirs) / theirs
    sign, kind = ("−", "good") if change < 0 else ("+", "bad")
    return f'<span class="{kind}">{sign}{percent(abs(change))}</span>'


def _cell(value: float | None, show: Callable[[float], str]) -> str:
    return "–" if value is None else escape(show(value))
