import os
import subprocess
import sys

import pytest

from opus_jax.distributed import platform


@pytest.fixture
def machine(monkeypatch):
    """A machine with libtpu installed and no device at all; tests add to it. JAX has not been imported."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
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
    assert os.environ["XLA_FLAGS"].split() == [*platform.GPU_FLAGS, "--xla_dump_to=here"]


def test_a_gpu_without_its_plugin_is_mentioned(machine, capsys):
    machine.setattr(platform, "nvidia_devices", lambda: ["/dev/nvidia0"])
    platform.choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert "opus-jax[gpu]" in capsys.readouterr().err


def test_flags_of_the_user_come_before_ours(machine):
    given = "--xla_gpu_triton_gemm_any=false --xla_gpu_autotune_level=0"
    machine.setenv("XLA_FLAGS", given)
    machine.setattr(platform, "nvidia_devices", lambda: ["/dev/nvidia0"])
    machine.setattr(platform, "accelerator_plugins", lambda: ["xla_cuda13"])
    platform.choose_platform()
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_enable_latency_hiding_scheduler=true {given}"


def test_without_a_gpu_no_flag_is_set(machine):
    machine.setattr(platform, "accelerator_plugins", lambda: ["xla_cuda13"])
    platform.choose_platform()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"


def test_xla_knows_our_flags():
    """An unknown one ends the process."""
    environment = os.environ | {"XLA_FLAGS": " ".join(platform.GPU_FLAGS), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_plugin_is_left_to_jax(machine):
    machine.setattr(platform, "accelerator_plugins", lambda: ["xla_cuda13", "some_other"])
    platform.choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_no_flags_for_gpus_where_none_is_to_be_used(machine):
    machine.setenv("JAX_PLATFORMS", "cpu")
    machine.setattr(platform, "nvidia_devices", lambda: ["/dev/nvidia0"])
    machine.setattr(platform, "accelerator_plugins", lambda: ["xla_cuda13"])
    platform.choose_platform()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"


@pytest.mark.parametrize("code", ["import opus_jax, jax", "import jax; import opus_jax"])
def test_the_library_is_silent_about_libtpu(code):
    code += "; print(jax.devices()[0])"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "libtpu" not in done.stderr.lower()
    assert "tpu" not in done.stderr.lower()
