"""What block sizes depend on: the TPU generation of the mesh in use."""

from dataclasses import dataclass

import jax

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Largest blocks for one generation.

    Attributes:
      tile: rows and columns of a gradient tile in VMEM, multiples of 128.
      tokens: tokens of one block, all its examples together.
      vmem_bytes: what a kernel may ask for; some is left to XLA, which keeps operands of its own there.
      cores: TensorCores that share a device's grid.
    """

    tile: int
    tokens: int
    vmem_bytes: int
    cores: int = 1


# By the compiler's own schedule, `python -m pallas_kernels.ghost_sketch.bench`; the table is in docs/kernels.md.
LIMITS = {
    "v4": Limits(512, 1024, 14 * MIB, cores=2),
    "v5e": Limits(1024, 4096, 64 * MIB),
    "v5p": Limits(1024, 4096, 44 * MIB, cores=2),
    "v6e": Limits(1024, 4096, 80 * MIB),
    "tpu7x": Limits(1024, 4096, 44 * MIB),
}

_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def generation_in_use() -> str:
    """Generation of the mesh in use (`jax.set_mesh`) or of the default device; 'v4', the smallest, for any other."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return _KINDS.get(kind, "v4")
