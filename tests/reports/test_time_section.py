import json
from pathlib import Path

from fabricate import HOSTILE, small_config, write_run

from opus_jax.reports.run import load_run
from opus_jax.reports.time_section import METRIC, spent, time_section
from opus_jax.training.goodput import CATEGORIES


def logged(folder: Path, *, finished: bool, **seconds: float) -> Path:
    """A run whose lines and summary say where the time went."""
    run = write_run(folder / "run", small_config(folder), ["prose"], finished=finished)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    for line in lines:
        line[METRIC] = {name: value * line["step"] / lines[-1]["step"] for name, value in seconds.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {METRIC: seconds, "attempts": 3}))
    return run


def test_time_and_share_of_every_category(tmp_path: Path) -> None:
    markup, (chart,) = time_section(load_run(logged(tmp_path, finished=True, step=75.0, compile=25.0)))
    assert "1 min 40 s of wall time, over 3 starts" in markup
    assert "<td>75.0 s</td>" not in markup, "above a minute it is minutes"
    assert "<td>1 min 15 s</td><td>75 %</td>" in markup
    assert "<td>25.0 s</td><td>25 %</td>" in markup
    assert [trace.name for trace in chart.figure.data] == ["compile", "step"]
    assert chart.figure.data[1].y[-1] == 75.0


def test_an_unfinished_run_shows_its_last_line(tmp_path: Path) -> None:
    run = load_run(logged(tmp_path, finished=False, step=30.0, save=10.0))
    assert spent(run) == {"step": 30.0, "save": 10.0}


def test_a_run_that_logged_none_has_no_such_section(tmp_path: Path) -> None:
    assert time_section(load_run(write_run(tmp_path / "run", small_config(tmp_path), ["prose"]))) == ("", [])


def test_names_that_are_no_categories_are_left_out(tmp_path: Path) -> None:
    hostile = dict.fromkeys(HOSTILE, 1.0)
    markup, (chart,) = time_section(load_run(logged(tmp_path, finished=True, step=1.0, **hostile)))
    assert "alert" not in markup + chart.figure.to_json()
    assert set(spent(load_run(tmp_path / "run"))) <= set(CATEGORIES)
