from pathlib import Path

from opus_jax.reports.result_charts import target_chart
from opus_jax.reports.run import load_run


def test_three_budgets_for_every_run(trained: Path) -> None:
    runs = [load_run(trained), load_run(trained.with_name("run-random"))]
    chart = target_chart(runs)
    assert chart is not None
    assert chart.axes is not None
    assert [trace.name for trace in chart.figure.data] == ["run", "run-random"]
    assert chart.axes["update tokens"][0] == chart.axes["update tokens"][1] == [10_000.0 * i for i in range(1, 9)]
    assert chart.axes["FLOPs"][0][-1] == 2 * chart.axes["FLOPs"][1][-1]
