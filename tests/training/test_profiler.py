import gzip
import json
from pathlib import Path

import pytest
from small_runs import small_config

from opus_jax import cli
from opus_jax.errors import UserError
from opus_jax.training.loop import train
from opus_jax.training.profiler import Profiler, profiled_steps


def test_the_steps_that_are_asked_for() -> None:
    assert profiled_steps("steps=10:13") == range(10, 13)
    assert not profiled_steps(None)


@pytest.mark.parametrize("text", ["10:13", "steps=3", "steps=5:5", "steps=0:2", "steps=a:b", "steps=-1:2", ""])
def test_anything_else_is_one_clear_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"steps=A:B .*for example steps=10:13"):
        profiled_steps(text)
    config = small_config(tmp_path)
    config.save(tmp_path / "small.yaml")
    assert cli.main(["train", str(tmp_path / "small.yaml"), f"--profile={text}"]) == cli.USER_MISTAKE
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("opus-jax train: --profile")
    assert "\n" not in shown
    assert not (tmp_path / "run").exists()


def test_steps_beyond_the_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run has 12 steps"):
        Profiler(tmp_path, range(13, 15), 12)


def test_a_resumed_run_traces_what_is_left(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, range(3, 6), 12)
    assert [step for step in range(1, 9) if profiler.starts(step)] == [3, 4, 5], "whichever of them comes first"
    assert not profiler.ends(5), "nothing is being traced"


def test_only_the_named_steps_are_traced(tmp_path: Path) -> None:
    config = small_config(tmp_path, "selection.method=random", "run.steps=7", "run.eval_every=7", "run.save_every=7")
    train(config, progress=False, profile=range(4, 6))
    profile = tmp_path / "run" / "profile"
    assert len(list(profile.rglob("*.xplane.pb"))) == 1, "what XProf reads"
    (trace,) = profile.rglob("*.trace.json.gz")
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train") == [4, 5]
