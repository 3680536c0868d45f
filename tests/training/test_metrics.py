import importlib.util
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import TrackingConfig
from opus_jax.errors import MissingExtraError
from opus_jax.training.metrics import MetricsWriter

OFF = TrackingConfig(tensorboard=False)


def read(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def fill(folder, steps, tracking=OFF, resume_step=0):
    with MetricsWriter(folder, tracking, resume_step) as writer:
        for step in steps:
            writer.write({"step": step, "loss": np.float32(1) / step, "selected_share": {"web": 0.25, "books": 0.75}})


def test_one_object_per_line_and_float32_survives(tmp_path):
    fill(tmp_path, [1, 3])
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 3]
    assert np.float32(lines[1]["loss"]) == np.float32(1) / 3
    assert lines[1]["selected_share"] == {"web": 0.25, "books": 0.75}


def test_non_finite_numbers_are_null_and_named(tmp_path):
    with MetricsWriter(tmp_path, OFF) as writer:
        writer.write(
            {"step": 1, "loss": jnp.float32(jnp.nan), "bits_per_byte": {"web": float("-inf")}, "lr": np.float64(0)}
        )
    expected = {"step": 1, "loss": None, "bits_per_byte": {"web": None}, "lr": 0.0}
    assert read(tmp_path) == [expected | {"nonfinite": {"loss": "nan", "bits_per_byte/web": "-inf"}}]


def test_a_line_is_readable_at_once(tmp_path):
    with MetricsWriter(tmp_path, OFF) as writer:
        writer.write({"step": 1})
        assert read(tmp_path) == [{"step": 1}]


def test_resume_removes_later_lines_and_a_torn_one(tmp_path):
    fill(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')
    fill(tmp_path, [3, 4, 5], resume_step=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_that_is_valid_json_goes_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    fill(tmp_path, [2], resume_step=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_a_fresh_start_removes_lines_of_a_run_killed_before_its_first_checkpoint(tmp_path):
    fill(tmp_path, [1, 2])
    fill(tmp_path, [1])
    assert [line["step"] for line in read(tmp_path)] == [1]


def tensorboard_events(folder):
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted((folder / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length


def test_tensorboard_gets_flat_names_and_is_told_to_forget(tmp_path):
    fill(tmp_path, [1, 2, 3], TrackingConfig())
    fill(tmp_path, [3], TrackingConfig(), resume_step=2)
    events = list(tensorboard_events(tmp_path))
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert (2, "selected_share/books", 0.75) in scalars
    assert {tag for _, tag, _ in scalars} == {"loss", "selected_share/web", "selected_share/books"}
    # a session that starts at step 3 makes TensorBoard drop earlier events from step 3 on
    assert [e.step for e in events if e.session_log.status][-1] == 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_what_to_install(tmp_path, name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"tracking.{name} needs .*opus-jax\[{name}\]"):
        MetricsWriter(tmp_path, TrackingConfig(tensorboard=False, **{name: "project"}))


class FakeRun:
    def __init__(self, module, options):
        self.module, self.options, self.lines = module, options, []
        module.runs.append(self)

    def log(self, metrics, step):
        self.lines.append((step, metrics["loss"]))

    def finish(self):
        self.module.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """Stands in for a service that cannot be reached from a test."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.util.spec_from_loader(request.param, None)
    module.runs, module.finished = [], 0
    module.init = lambda **options: FakeRun(module, options)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_resumed_run_continues_the_same_tracked_run(tmp_path, tracker):
    tracking = TrackingConfig(tensorboard=False, **{tracker.__name__: "project"})
    fill(tmp_path, [1, 2, 4], tracking)
    fill(tmp_path, [4, 8], tracking, resume_step=2)
    first, second = tracker.runs
    assert first.options == second.options
    assert first.options["resume"] == "allow"
    assert first.lines == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert second.lines[-1] == (8, 0.125)
    assert tracker.finished == 2


def test_trackers_get_no_configuration(tmp_path, tracker, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    fill(tmp_path, [1], TrackingConfig(tensorboard=False, **{tracker.__name__: "project"}))
    assert "hunter2" not in repr(tracker.runs[0].options)
    assert "config" not in tracker.runs[0].options
