from pathlib import Path

import numpy as np
import pytest
from fabricate import small_config, write_run

from opus_jax.data.records import RowReader
from opus_jax.reports.corpus import records_folder
from opus_jax.reports.result_charts import domains_chart, loss_chart, target_chart
from opus_jax.reports.run import load_run


def test_every_budget_for_every_run(trained: Path) -> None:
    runs = [load_run(trained), load_run(trained.with_name("run-random"))]
    chart = target_chart(runs)
    assert chart is not None
    assert chart.axes is not None
    assert [trace.name for trace in chart.figure.data] == ["run", "run-random"]
    assert chart.axes["update tokens"][0] == chart.axes["update tokens"][1] == [10_000.0 * i for i in range(1, 9)]
    assert chart.axes["FLOPs"][0][-1] == 2 * chart.axes["FLOPs"][1][-1]
    assert list(chart.axes) == ["update tokens", "seen tokens", "FLOPs", "seconds", "epochs"]
    rows = RowReader(records_folder(trained), "train")
    a_pass = rows.read(range(len(rows)))["loss_mask"].sum()
    assert chart.axes["epochs"][0] == pytest.approx([20_000 * i / a_pass for i in range(1, 9)], rel=0.05)
    # The speed of step s is 5000 + s % 5 tokens a second, for 1000 tokens.
    assert chart.axes["seconds"][1][-1] == pytest.approx(16 * sum(1000 / (5000 + i) for i in range(5)))


def test_three_runs_of_which_one_has_lost_its_corpus(trained: Path, tmp_path: Path) -> None:
    lost = write_run(tmp_path / "lost", small_config(tmp_path), ["prose"])
    runs = [load_run(folder) for folder in (trained, trained.with_name("run-random"), lost)]
    for chart in (target_chart(runs), loss_chart(runs)):
        assert chart is not None
        assert chart.axes is not None
        assert [np.isfinite(x).all() for x in chart.axes["epochs"]] == [True, True, False]
        assert all(np.isfinite(x).all() for x in chart.axes["seconds"])
        assert "Epochs are unknown for lost" in chart.caption


def test_an_axis_that_no_run_has_gets_no_button(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", small_config(tmp_path), ["prose"]))
    for chart in (target_chart([run]), loss_chart([run]), domains_chart([run])):
        assert chart is not None
        assert chart.axes is not None
        assert list(chart.axes) == ["update tokens", "seen tokens", "FLOPs", "seconds"]
        assert "unknown" not in chart.caption
