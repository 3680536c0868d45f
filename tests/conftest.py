"""All tests run on CPU, with 8 virtual devices, shapes checked, and no network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("opus_jax", "beartype.beartype").install()

import jax  # noqa: E402

jax.config.update("jax_threefry_partitionable", True)
