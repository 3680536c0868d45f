import os
import subprocess
import sys

import pytest

from opus_jax.distributed import platform


@pytest.fixture
def machine(monkeypatch):
    """A machine with libtpu installed and no device at all; tests add to it."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: object())
    for name in ("tpu_devices", "nvidia_devices", "accelerator_plugins"):
        monkeypatch.setattr(platform, name, list)
    return monkeypatch


def test_without_a_tpu_jax_is_told_to_use_the_cpu(machine, capsys):
    platform.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert capsys.readouterr().err == ""


def test_the_users_choice_is_kept(machine):
    machine.setenv("JAX_PLATFORMS", "cuda")
    platform.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cuda"


def test_a_tpu_is_left_to_jax(machine):
    machine.setattr(platform, "tpu_devices", lambda: ["/dev/accel0"])
    platform.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_without_libtpu_nothing_is_set(machine):
    machine.setattr(platform.importlib.util, "find_spec", lambda name: None)
    platform.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_a_gpu_with_its_plugin_comes_first(machine):
    machine.setattr(platform, "nvidia_devices", lambda: ["/dev/nvidia0"])
    machine.setattr(platform, "accelerator_plugins", lambda: ["xla_cuda13"])
    platform.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"


def test_a_gpu_without_its_plugin_is_mentioned(machine, capsys):
    machine.setattr(platform, "nvidia_devices", lambda: ["/dev/nvidia0"])
    platform.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert "opus-jax[gpu]" in capsys.readouterr().err


def test_an_unknown_plugin_is_left_to_jax(machine):
    machine.setattr(platform, "accelerator_plugins", lambda: ["xla_cuda13", "some_other"])
    platform.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_commands_are_silent_about_libtpu():
    code = "from opus_jax.distributed.platform import choose_platform as c; c(); import jax; print(jax.devices()[0])"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "libtpu" not in done.stderr.lower()
    assert "tpu" not in done.stderr.lower()
