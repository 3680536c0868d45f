from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
from fabricate import write_decisions

from opus_jax.config import PlanConfig
from opus_jax.reports.chart import DOMAINS, Chart
from opus_jax.reports.cluster_charts import EXTREMES, cluster_share_chart, cluster_worth_chart, largest_falls
from opus_jax.reports.corpus import manifest_of
from opus_jax.reports.decisions import Decision, Worth, read_decisions
from opus_jax.reports.plan_charts import PLANS, first_weights, passes_chart, weights_chart, worth_chart
from opus_jax.reports.run import load_run

NAMES = ["prose", "code", "logs"]


@pytest.fixture
def decisions(tmp_path: Path) -> list[Decision]:
    return read_decisions(write_decisions(tmp_path, NAMES, [1]))


def drawn(chart: Chart | None) -> Chart:
    assert chart is not None
    return chart


def test_weights_from_the_first_plan_to_the_last_step(decisions: list[Decision]) -> None:
    first = dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True))
    bands = drawn(weights_chart(decisions, first, last_step=80)).figure.data
    assert [band.name for band in bands] == NAMES
    for band in bands:
        assert list(band.x) == [0, 20, 30, 40, 50, 60, 70, 80]
        wanted = [first[band.name], *(d.domains[band.name].weight for d in decisions)]
        assert list(band.y) == pytest.approx([100 * w for w in [*wanted, wanted[-1]]], rel=1e-4)
        assert (band.line.shape, band.stackgroup) == ("hv", "share")


@pytest.mark.parametrize("first", [{}, {"prose": 1.0}])
def test_a_first_plan_of_other_domains_is_left_out(decisions: list[Decision], first: dict[str, float]) -> None:
    assert drawn(weights_chart(decisions, first, last_step=5)).figure.data[0].x[0] == 20


def test_first_weights_are_those_of_the_rows_or_of_the_settings(trained: Path) -> None:
    manifest = manifest_of(trained)
    assert manifest is not None
    config = load_run(trained).config
    rows = manifest.rows["train"]
    expected = {name: rows[name] / sum(rows.values()) for name in manifest.domains}
    assert first_weights(config, manifest) == pytest.approx(expected)
    assert first_weights(config, None) == {}
    assert first_weights(replace(config, plan=PlanConfig(importance="dsir")), manifest) == {}
    config.corpus.weights["absent"] = 1.0
    try:
        assert first_weights(config, manifest) == {}
    finally:
        del config.corpus.weights["absent"]


def test_worths_with_their_errors(decisions: list[Decision]) -> None:
    lines = drawn(worth_chart(decisions)).figure.data
    assert [line.name for line in lines] == NAMES
    assert list(lines[0].y) == pytest.approx([d.domains["prose"].worth.mean for d in decisions], rel=1e-4)
    expected = [d.domains["prose"].worth.standard_error for d in decisions]
    assert list(lines[0].error_y.array) == pytest.approx(expected, rel=1e-4)
    assert list(lines[0].x) == [d.step for d in decisions]


def test_a_bandit_has_rewards_without_errors(decisions: list[Decision]) -> None:
    bandit = [
        replace(d, kind="odm", domains={n: replace(p, worth=Worth(1.5, nan, nan)) for n, p in d.domains.items()})
        for d in decisions
    ]
    chart = drawn(worth_chart(bandit))
    assert chart.title == "Reward of the domains"
    assert "standard error" not in chart.caption
    assert chart.figure.layout.yaxis.title.text == "mean reward"
    assert set(chart.figure.data[0].y) == {1.5}


def test_passes_and_their_limit(decisions: list[Decision]) -> None:
    chart = drawn(passes_chart(decisions, 4.0))
    assert "the limit, 4" in chart.caption
    assert chart.figure.data[0].y[-1] == pytest.approx(decisions[-1].domains["prose"].epochs, rel=1e-4)
    assert chart.figure.layout.shapes[0].y0 == 4.0
    assert not drawn(passes_chart(decisions, None)).figure.layout.shapes


def test_clusters_at_both_ends(decisions: list[Decision]) -> None:
    worth = drawn(cluster_worth_chart(decisions)).figure
    assert len(worth.data[0].y) == 2 * EXTREMES
    assert list(worth.data[0].x) == sorted(worth.data[0].x)
    assert (worth.data[0].x[0], worth.data[0].x[-1]) == (-1, 1)
    assert list(worth.data[0].error_x.array) == [0.1] * 2 * EXTREMES
    assert not any(": 0 scores" in name for name in worth.data[0].hovertext)
    share = drawn(cluster_share_chart(decisions)).figure
    before, after = share.data
    assert set(before.x) == {6.25}
    assert after.x[0] == min(after.x) < 6.25 < max(after.x) == after.x[-1]


def test_equal_labels_keep_their_own_places_and_carry_no_markup(decisions: list[Decision]) -> None:
    for chart in (cluster_worth_chart(decisions), cluster_share_chart(decisions)):
        figure = drawn(chart).figure
        assert list(figure.data[0].y) == list(figure.layout.yaxis.tickvals) == list(range(2 * EXTREMES))
        assert len(set(figure.data[0].hovertext)) == len(figure.layout.yaxis.ticktext) == 2 * EXTREMES
        assert len(set(figure.layout.yaxis.ticktext)) < 2 * EXTREMES
        for name in (*figure.data[0].hovertext, *figure.layout.yaxis.ticktext):
            assert "<" not in name
            assert "\u202e" not in name


def test_largest_falls_come_first(decisions: list[Decision]) -> None:
    assert [c.place for c in largest_falls(decisions, 3)] == ["prose 0", "code 0", "prose 1"]
    assert all(c.fall > 0 for c in largest_falls(decisions, 99))


def test_very_many_domains_and_changes(tmp_path: Path) -> None:
    names = [f"domain {i}" for i in range(40)]
    one = read_decisions(write_decisions(tmp_path, names, []))[0]
    many = [one] * 1000
    weights = drawn(weights_chart(many, {}, 80)).figure.data
    assert weights[-1].name == "31 other domains"
    assert len(weights) == DOMAINS
    assert sum(band.y[0] for band in weights) == pytest.approx(100, abs=0.01)
    worths = drawn(worth_chart(many)).figure.data
    assert {"domain 0", "domain 39"} < {line.name for line in worths}
    for figure in (weights, worths, drawn(passes_chart(many, 4.0)).figure.data):
        assert len(figure) <= DOMAINS
        assert all(len(trace.x) <= PLANS + 2 for trace in figure)


def test_nothing_to_draw() -> None:
    assert weights_chart([], {}, 1) is None
    assert passes_chart([], 4.0) is None
    for make in (worth_chart, cluster_worth_chart, cluster_share_chart):
        assert make([]) is None
    assert largest_falls([], 3) == []
