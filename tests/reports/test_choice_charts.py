from pathlib import Path

import numpy as np
import pytest

from opus_jax.reports.chart import DOMAINS, label
from opus_jax.reports.choice_charts import (
    preference_chart,
    share_chart,
    utility_chart,
    utility_over_time_chart,
    z_quantile,
)
from opus_jax.reports.run import load_run
from opus_jax.reports.selection_reader import Z_EDGES, SelectionSummary
from opus_jax.reports.series import Series


def test_quantiles_of_histograms() -> None:
    z = np.random.default_rng(0).normal(size=20_000)
    counts = np.stack([np.histogram(z, Z_EDGES)[0], np.zeros(len(Z_EDGES) - 1, int)])
    for share in (0.25, 0.5, 0.9):
        found = z_quantile(counts, share)
        assert found[0] == pytest.approx(np.quantile(z, share), abs=0.02)
        assert np.isnan(found[1])


def test_very_many_domains_are_gathered(trained: Path) -> None:
    names = [f"domain {i}" for i in range(50)]
    series = {name: Series(np.array([1]), np.array([0.02])) for name in names}
    run = load_run(trained)
    run.by_domain["selected_share"] = series
    offered = np.tile(np.arange(50), (4, 1))
    summary = SelectionSummary(np.arange(1, 6), offered, offered // 2, np.ones((4, 50, 32), int), (), ())
    chart = preference_chart(run, summary)
    assert chart is not None
    bars = chart.figure.data[0]
    assert len(bars.y) == DOMAINS
    assert "40 other domains" in bars.y
    assert "domain 49" in bars.y
    for make in (share_chart, utility_chart, utility_over_time_chart):
        chart = make(run, summary)
        assert chart is not None
        assert len(chart.figure.data) <= 3 * DOMAINS


def test_preference_is_selected_share_over_offered_share(trained: Path) -> None:
    run = load_run(trained)
    offered, selected = np.array([[60, 30, 10]]), np.array([[30, 10, 10]])
    summary = SelectionSummary(np.array([1, 2]), offered, selected, np.zeros((1, 3, 32), int), (), ())
    chart = preference_chart(run, summary)
    assert chart is not None
    assert chart.figure.layout.yaxis.type == "category"  # or domains "2020" and "2021" would be numbers
    found = dict(zip(chart.figure.data[0].y, chart.figure.data[0].x, strict=True))
    expected = [(30 / 50) / 0.6, (10 / 50) / 0.3, (10 / 50) / 0.1]
    assert [found[label(name)] for name in run.domains] == pytest.approx(expected, rel=1e-4)
    assert utility_chart(run, summary) is None
