"""All tests run on CPU, with 8 virtual devices, shapes checked, and no network."""

import os
from importlib.metadata import version

# Tests compile far more than they compute, so they ask the compiler for haste.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # gone in later versions, and unknown flags are fatal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# Collectives of two programs at once can starve each other where devices are threads of a few cores.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook(["opus_jax", "pallas_kernels"], "beartype.beartype")
