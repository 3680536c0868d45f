"""Which kind of device JAX uses, decided before JAX is first imported.

An installed libtpu makes JAX look for a TPU on every start, with a page of warnings where there is none. libtpu is
also what `opus-jax compile` needs, so it is often installed on machines without a TPU.
"""

import glob
import importlib.util
import os
import pkgutil
import sys

# What XLA leaves off and helps training on GPUs: collectives beside products, and Triton for products that fuse.
GPU_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true", "--xla_gpu_triton_gemm_any=true")


def choose_platform() -> None:
    """Keep JAX from looking for a TPU that is not there, and give XLA the flags that help a GPU that is.

    A platform that the user has set is left alone, and so is every flag. Flags for GPUs are not set where no GPU is to
    be used: other compilers, libtpu's above all, end the process at flags that they do not know.
    """
    asked = os.environ.get("JAX_PLATFORMS", "cuda")
    gpu = any(name in asked for name in ("cuda", "gpu"))
    if gpu and nvidia_devices() and any("cuda" in name for name in accelerator_plugins()):
        os.environ["XLA_FLAGS"] = with_gpu_flags(os.environ.get("XLA_FLAGS", ""))
    if "JAX_PLATFORMS" in os.environ or tpu_devices() or importlib.util.find_spec("libtpu") is None:
        return
    plugins = accelerator_plugins()
    if not plugins:
        _set_platform("cpu")
        _mention_unused_gpu()
    elif all("cuda" in name for name in plugins):
        _set_platform("cuda,cpu" if nvidia_devices() else "cpu")


def _set_platform(names: str) -> None:
    """Also for a JAX that has been imported, and has read its environment, but has not looked for devices yet."""
    os.environ["JAX_PLATFORMS"] = names
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", names)


def with_gpu_flags(given: str) -> str:
    """XLA_FLAGS with `GPU_FLAGS` in front of those given; one that is given, with whatever value, is not added."""
    names = [flag.split("=")[0] for flag in given.split()]
    return " ".join([*(flag for flag in GPU_FLAGS if flag.split("=")[0] not in names), *given.split()])


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
