import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from opus_jax import config as config_module
from opus_jax.config import Config
from opus_jax.errors import UserError
from opus_jax.training import run_lock
from opus_jax.training.environment import describe_environment, redact, redact_arguments
from opus_jax.training.run_folder import open_run_folder, read_summary, refuse_changed_config, write_summary

HOLD = """
import sys, time
from pathlib import Path
from opus_jax.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_writes_a_configuration_that_loads_back(tmp_path):
    config = config_module.from_mapping({}, ["run.steps=7", "corpus.weights.web=0.5"])
    with open_run_folder(tmp_path / "a" / "run", config) as folder:
        assert {"config.yaml", "environment.json", "lock"} <= {file.name for file in folder.iterdir()}
    loaded = Config.load(tmp_path / "a" / "run")
    assert config_module.changed_keys(loaded, config) == []


def test_the_second_trainer_is_refused_and_a_dead_one_is_replaced(tmp_path, holder):
    with pytest.raises(UserError, match=rf"process {holder.pid} on {socket.gethostname()} is training in"):
        open_run_folder(tmp_path, Config()).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with open_run_folder(tmp_path, Config()):
        pass


@pytest.mark.parametrize("clock", [0.0, 1e12], ids=["clock set back", "clock set forward"])
def test_a_lock_of_another_machine_holds_while_it_is_refreshed(tmp_path, monkeypatch, clock):
    """Seen by the file's time going on, whatever the clocks of the two machines say."""
    monkeypatch.setattr(time, "time", lambda: clock)
    monkeypatch.setattr(run_lock, "_REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(run_lock, "_STALE_SECONDS", 0.5)
    lock, stop = tmp_path / "lock", threading.Event()
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    living = threading.Thread(target=run_lock._refresh, args=(lock, stop))
    living.start()
    with pytest.raises(UserError, match="process 1 on elsewhere"), run_lock.run_lock(tmp_path):
        pass
    stop.set()
    living.join()
    with run_lock.run_lock(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert lock.read_text() == ""


def test_a_held_lock_is_refreshed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_REFRESH_SECONDS", 0.01)
    with run_lock.run_lock(tmp_path):
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 5
        while (tmp_path / "lock").stat().st_mtime < 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_changed_configuration_is_refused_with_every_key(tmp_path):
    old = config_module.from_mapping({}, ["run.steps=7", "corpus.weights.web=0.5", "corpus.weights.a\\.b=1"])
    new = config_module.from_mapping({}, ["run.steps=8", "corpus.weights.web=0.25", "run.dir=elsewhere"])
    with open_run_folder(tmp_path, old):
        refuse_changed_config(tmp_path, new)  # nothing was saved yet that would be lost
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    refuse_changed_config(tmp_path, old)
    with pytest.raises(UserError) as refused:
        refuse_changed_config(tmp_path, new)
    message = str(refused.value)
    assert "run.steps: 7 -> 8" in message
    assert "corpus.weights.web: 0.5 -> 0.25" in message
    assert "run.dir: " not in message
    assert "choose another run.dir" in message


def test_a_new_folder_refuses_nothing(tmp_path):
    refuse_changed_config(tmp_path / "new", Config())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot make the run folder"),
        open_run_folder(tmp_path / "file" / "x", Config()),
    ):
        pass


def test_environment_names_versions_devices_and_commit():
    described = describe_environment()
    assert described["packages"]["jax"]
    assert described["devices"]["count"] == 8
    assert len(described["git"]["commit"]) == 40


def test_no_secret_reaches_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_API_TOKEN", "hunter2")
    monkeypatch.setenv("XLA_FLAGS_EXTRA", "--dump=https://me:hunter3@host/x --auth_key=hunter4")
    monkeypatch.setenv("HF_TOKEN", "hunter5")
    monkeypatch.setattr(sys, "argv", ["train", "--token", "hunter6", "corpus.path=s3://id:hunter7@bucket"])
    with open_run_folder(tmp_path, Config()):
        pass
    text = (tmp_path / "environment.json").read_text()
    assert "hunter" not in text
    assert "TOKEN" in json.loads(text)["redacted_names"]


def test_redaction_keeps_what_is_not_secret():
    assert redact("XLA_FLAGS", "--xla_force_host_platform_device_count=8") == "--xla_force_host_platform_device_count=8"
    assert redact_arguments(["train", "configs/a.yaml", "run.steps=3"]) == ["train", "configs/a.yaml", "run.steps=3"]


def test_an_environment_that_changed_is_kept(tmp_path, monkeypatch):
    for value in ("1", "2", "2"):
        monkeypatch.setenv("JAX_EXAMPLE", value)
        with open_run_folder(tmp_path, Config()):
            pass
    described = json.loads((tmp_path / "environment.json").read_text())
    assert described["variables"]["JAX_EXAMPLE"] == "2"
    assert [before["variables"]["JAX_EXAMPLE"] for before in described["earlier"]] == ["1"]


def test_summary_is_strict_json_or_absent(tmp_path):
    assert read_summary(tmp_path) is None
    write_summary(tmp_path, {"steps": 3, "target_bits_per_byte": float("nan")})
    assert read_summary(tmp_path) == {
        "steps": 3,
        "target_bits_per_byte": None,
        "nonfinite": {"target_bits_per_byte": "nan"},
    }
