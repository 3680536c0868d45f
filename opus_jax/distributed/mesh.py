"""The device mesh: four named axes, always all four, size 1 where unused, so that no code branches on an axis."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from opus_jax.config import MeshConfig
from opus_jax.errors import ConfigError

AXES = ("replica", "data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices as (replica, data, fsdp, tensor); `data = -1` takes the devices that are left.

    Axis types are Auto: under Explicit axes optax's Muon and `vmap(grad)` are rejected by JAX. TPU slices lie along
    `replica`, outermost, so that no other axis crosses the data centre network.

    Raises:
      ConfigError: the axes' product is not the number of devices, or TPU slices do not divide `replica`.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = mesh_shape(config, len(devices))
    devices = slice_by_slice(devices, config.replica)
    return Mesh(np.asarray(devices, dtype=object).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Axis sizes for a number of devices."""
    others = config.replica * config.fsdp * config.tensor
    data = devices // others if config.data == -1 else config.data
    if data < 1 or data * others != devices:
        asked = f"replica {config.replica} x data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
        raise ConfigError("mesh", asked, f"the product of the axes must be the number of devices, {devices}")
    return config.replica, data, config.fsdp, config.tensor


def slice_by_slice(devices: Sequence[Any], replica: int) -> list[Any]:
    """Devices in the order in which so many replicas take them: of one TPU slice, then of the next.

    Raises:
      ConfigError: the slices do not divide the replicas.
    """
    slices = len({_slice_index(device) for device in devices})
    if replica % slices:
        allowed = f"must be a multiple of the {slices} TPU slices, which only this axis may cross; set it to {slices}"
        raise ConfigError("mesh.replica", replica, allowed)
    return sorted(devices, key=_slice_index)


def _slice_index(device: Any) -> int:
    """Devices of other kinds number by it what has other networks, or nothing."""
    return getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0


def batch_shards(mesh: Mesh) -> int:
    """How many ways a batch of rows is split."""
    return mesh.shape["replica"] * mesh.shape["data"] * mesh.shape["fsdp"]
