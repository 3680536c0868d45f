from pathlib import Path

import numpy as np
import pytest

from opus_jax.reports import figures
from opus_jax.reports.run import Series, load_run
from opus_jax.reports.selection_reader import Z_EDGES, SelectionSummary


def test_a_short_series_is_left_as_it_is() -> None:
    steps, values = figures.thin(Series(np.array([3, 5]), np.array([1.5, np.nan])))
    assert steps.tolist() == [3, 5]
    assert values[0] == 1.5
    assert np.isnan(values[1])


def test_a_long_series_is_averaged_without_its_gaps() -> None:
    values = np.arange(1000.0)
    values[::2] = np.nan
    steps, thinned = figures.thin(Series(np.arange(1000), values), points=10)
    assert steps.tolist() == list(range(0, 1000, 100))
    assert thinned == [50.0 + 100 * i for i in range(10)]


def test_quantiles_of_histograms() -> None:
    z = np.random.default_rng(0).normal(size=20_000)
    counts = np.stack([np.histogram(z, Z_EDGES)[0], np.zeros(len(Z_EDGES) - 1, int)])
    for share in (0.25, 0.5, 0.9):
        found = figures.z_quantile(counts, share)
        assert found[0] == pytest.approx(np.quantile(z, share), abs=0.02)
        assert np.isnan(found[1])


def test_labels_carry_no_markup_and_stay_short() -> None:
    assert figures.label("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"
    assert figures.label("y" * 99, 10) == "y" * 9 + "…"


def test_very_many_domains_are_gathered(trained: Path) -> None:
    names = [f"domain {i}" for i in range(50)]
    series = {name: Series(np.array([1]), np.array([0.02])) for name in names}
    run = load_run(trained)
    run.by_domain["selected_share"] = series
    offered = np.tile(np.arange(50), (4, 1))
    summary = SelectionSummary(np.arange(1, 6), offered, offered // 2, np.ones((4, 50, 32), int), (), ())
    chart = figures.preference_chart(run, summary)
    assert chart is not None
    bars = chart.figure.data[0]
    assert len(bars.y) == figures.DOMAINS
    assert "40 other domains" in bars.y
    assert "domain 49" in bars.y
    for make in (figures.share_chart, figures.utility_chart, figures.utility_over_time_chart):
        chart = make(run, summary)
        assert chart is not None
        assert len(chart.figure.data) <= 3 * figures.DOMAINS


def test_preference_is_selected_share_over_offered_share(trained: Path) -> None:
    run = load_run(trained)
    offered, selected = np.array([[60, 30, 10]]), np.array([[30, 10, 10]])
    summary = SelectionSummary(np.array([1, 2]), offered, selected, np.zeros((1, 3, 32), int), (), ())
    chart = figures.preference_chart(run, summary)
    assert chart is not None
    found = dict(zip(chart.figure.data[0].y, chart.figure.data[0].x, strict=True))
    expected = [(30 / 50) / 0.6, (10 / 50) / 0.3, (10 / 50) / 0.1]
    assert [found[figures.label(name)] for name in run.domains] == pytest.approx(expected, rel=1e-4)
    assert figures.utility_chart(run, summary) is None


def test_three_budgets_for_every_run(trained: Path) -> None:
    runs = [load_run(trained), load_run(trained.with_name("run-random"))]
    chart = figures.target_chart(runs)
    assert chart is not None
    assert chart.axes is not None
    assert [trace.name for trace in chart.figure.data] == ["run", "run-random"]
    assert chart.axes["update tokens"][0] == chart.axes["update tokens"][1] == [10_000.0 * i for i in range(1, 9)]
    assert chart.axes["FLOPs"][0][-1] == 2 * chart.axes["FLOPs"][1][-1]
