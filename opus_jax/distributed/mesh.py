"""The device mesh: four named axes, always all four, size 1 where unused, so that no code branches on an axis."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from opus_jax.config import MeshConfig
from opus_jax.errors import ConfigError

AXES = ("replica", "data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as (replica, data, fsdp, tensor); `data = -1` takes the devices that are left.

    Axis types are Auto: under Explicit axes optax's Muon and `vmap(grad)` are rejected by JAX.

    Raises:
      ConfigError: the axes' product is not the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = mesh_shape(config, len(devices))
    return Mesh(np.asarray(devices, dtype=object).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Axis sizes for a number of devices."""
    others = config.replica * config.fsdp * config.tensor
    data = devices // others if config.data == -1 else config.data
    if data < 1 or data * others != devices:
        asked = f"replica {config.replica} x data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
        raise ConfigError("mesh", asked, f"the product of the axes must be the number of devices, {devices}")
    return config.replica, data, config.fsdp, config.tensor


def batch_shards(mesh: Mesh) -> int:
    """How many ways a batch of rows is split."""
    return mesh.shape["replica"] * mesh.shape["data"] * mesh.shape["fsdp"]
