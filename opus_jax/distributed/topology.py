"""Names of TPU slices, `v5p:2x2x4` (generation : chips along each axis of the interconnect), and what they have.

Used by `opus-jax compile`, which builds devices of a slice that is not there.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from opus_jax.errors import UserError


@dataclass(frozen=True)
class Generation:
    """What all slices of one TPU generation share.

    Attributes:
      axes: dimensions of the interconnect.
      compiler_name: what libtpu calls it.
      accelerator: prefix of the accelerator type; its suffix counts `cores_per_chip`.
      devices_per_chip: JAX devices; a v4 or v5p chip's two cores work as one device, a tpu7x chip is two.
      hbm_gib: memory of one device that a program may use, as the compiler itself reports it.
      largest: chips of the largest slice.
    """

    axes: int
    compiler_name: str
    accelerator: str
    cores_per_chip: int
    devices_per_chip: int
    hbm_gib: float
    largest: int


GENERATIONS = {
    "v4": Generation(3, "v4", "v4", 2, 1, 30.75, 4096),
    "v5e": Generation(2, "v5e", "v5litepod", 1, 1, 15.75, 256),
    "v5p": Generation(3, "v5", "v5p", 2, 1, 95.7, 6144),
    "v6e": Generation(2, "v6e", "v6e", 1, 1, 31.2, 256),
    "tpu7x": Generation(3, "tpu7x", "tpu7x", 2, 2, 94.7, 9216),
}

GIB = 2**30
CUBE, POD_SIDE = 4, 16  # chips along the side of a cube that is switched as a whole; along the side of a flat pod

# Slices of two axes are a fixed list; of three axes, these and every ascending box of multiples of 4.
FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SMALL_BOXES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclass(frozen=True)
class Topology:
    """One slice, or several equal ones: a generation and the number of chips along each axis of a slice."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.kind]

    @property
    def slice_name(self) -> str:
        """As `parse_topology` reads it."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices} x {self.slice_name}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices_per_chip

    @property
    def accelerator_type(self) -> str:
        """The name under which the cloud lends one slice, for example v5p-32 for 16 chips."""
        return f"{self.generation.accelerator}-{math.prod(self.shape) * self.generation.cores_per_chip}"

    def wraps(self, dimension: int) -> bool:
        """Whether the chips along a dimension of a slice form a ring: in whole cubes, and along a pod's whole side."""
        if self.generation.axes == 2:
            return self.shape[dimension] == POD_SIDE
        return all(size % CUBE == 0 for size in self.shape)


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Read `GENERATION:AxB` or `GENERATION:AxBxC`: the shape of each of so many slices.

    Raises:
      UserError: the generation is unknown or has no slice of that shape (the message lists what there is), or there
        is no slice at all.
    """
    if slices < 1:
        raise UserError(f"{slices} slices: must be at least 1")
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text.strip().lower())
    if not match:
        raise UserError(f"topology {text!r}: must be GENERATION:SHAPE, for example v5p:2x2x4 or v5e:4x4")
    name, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    if name not in GENERATIONS:
        raise UserError(f"topology {text!r}: unknown generation {name!r}; must be one of {', '.join(GENERATIONS)}")
    generation = GENERATIONS[name]
    if not _exists(generation, shape):
        raise UserError(f"topology {text!r}: {name} has no such slice; it has {_allowed(generation)}")
    return Topology(name, shape, slices)


def absent_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, slice by slice, in the order of the interconnect.

    Needs libtpu and `compiler_environment`.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": _host_bounds(topology.shape), "num_slices": topology.slices}
    if topology.generation.compiler_name == "v4":
        options["chip_config_name"] = "megacore"  # otherwise each of a chip's two cores is a device of its own
    name = f"{topology.generation.compiler_name}:{'x'.join(map(str, topology.shape))}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def compiler_environment(topology: Topology) -> dict[str, str]:
    """Variables under which libtpu compiles without a TPU: no metadata server, no lock, no log files."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # libtpu ends the process at a flag that only other backends know
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": topology.accelerator_type,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
    }


def _exists(generation: Generation, shape: tuple[int, ...]) -> bool:
    if generation.axes == 2:
        return shape in FLAT_SHAPES
    box = len(shape) == 3 and all(size and size % CUBE == 0 for size in shape) and list(shape) == sorted(shape)
    return shape in SMALL_BOXES or (box and math.prod(shape) <= generation.largest)


def _allowed(generation: Generation) -> str:
    shapes = FLAT_SHAPES if generation.axes == 2 else SMALL_BOXES
    names = ", ".join("x".join(map(str, shape)) for shape in shapes)
    if generation.axes == 2:
        return names
    return f"{names}, and AxBxC of ascending multiples of 4 up to {generation.largest} chips (4x4x4, 4x4x8, ...)"


def _host_bounds(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips of one host along each axis: 2 x 2, or the one chip there is."""
    return (min(shape[0], 2), min(shape[1], 2), 1)
