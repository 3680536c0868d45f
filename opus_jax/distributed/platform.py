"""Which kind of device JAX uses, decided before JAX is first imported.

An installed libtpu makes JAX look for a TPU on every start, with a page of warnings where there is none. libtpu is
also what `opus-jax compile` needs, so it is often installed on machines without a TPU.
"""

import glob
import importlib.util
import os
import pkgutil
import sys


def choose_platform() -> None:
    """Keep JAX from looking for a TPU that is not there; a platform that the user has set is left alone."""
    if "JAX_PLATFORMS" in os.environ or tpu_devices() or importlib.util.find_spec("libtpu") is None:
        return
    plugins = accelerator_plugins()
    if not plugins:
        os.environ["JAX_PLATFORMS"] = "cpu"
        _mention_unused_gpu()
    elif all("cuda" in name for name in plugins):
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if nvidia_devices() else "cpu"


def tpu_devices() -> list[str]:
    """Device files of attached TPUs."""
    return glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")


def nvidia_devices() -> list[str]:
    """Device files of NVIDIA GPUs, also within containers and WSL 2."""
    return [path for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg") if os.path.exists(path)]


def accelerator_plugins() -> list[str]:
    """Names of the JAX device plugins that are installed; libtpu is not among them."""
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    import jax_plugins

    return sorted(module.name for module in pkgutil.iter_modules(jax_plugins.__path__))


def _mention_unused_gpu() -> None:
    if nvidia_devices():
        print(
            "opus-jax: an NVIDIA GPU is here but JAX's CUDA build is not installed, so the CPU is used; to use it: "
            'pip install "opus-jax[gpu]" (in a checkout: make venv DEVICE=gpu)',
            file=sys.stderr,
        )
