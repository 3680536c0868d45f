"""How long a compiled program would take if nothing but the chip's stated limits held it up.

Every instruction takes the longer of its arithmetic at the peak and its traffic at the bandwidth of main memory; a
collective takes what its bytes need over the links that its devices have, and the latency of the way. No real step is
as fast: it is a bound to compare configurations, meshes and slice sizes by, not a promise.

Figures of a chip, from the pages of the Cloud TPU documentation named after each generation (docs.cloud.google.com,
tpu/docs/v4, v5e, v5p, v6e, tpu7x): peak bfloat16 FLOP/s, HBM bandwidth, and bandwidth between chips in both directions
over all links, which is divided by the links (4 in two dimensions, 6 in three) and the two directions here: 50 GB/s on
v5e, 100 GB/s on v5p, v6e and TPU7x. v4's page gives no bandwidth per chip; its paper (arXiv 2304.01433) gives 50 GB/s
for a link and direction. The data centre network's bandwidth per chip is stated for v5p, v6e and TPU7x and follows from
a pod's for v5e (6.4 Tb/s over 256); for v4 v5p's is assumed. No page states latencies: 1 microsecond for a hop between
chips, 1 to start a collective and 50 for a message between slices are assumed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from opus_jax.distributed.hlo import Collective, collectives
from opus_jax.distributed.hlo_costs import work
from opus_jax.distributed.hlo_text import Program
from opus_jax.distributed.topology import Topology

HOP_SECONDS = 1e-6
START_SECONDS = 1e-6
SLICE_SECONDS = 50e-6


@dataclass(frozen=True)
class Speeds:
    """Of one chip: bfloat16 FLOP/s, bytes/s of HBM, of one link in one direction, and of the data centre network."""

    flops: float
    hbm: float
    link: float
    network: float


SPEEDS = {
    "v4": Speeds(275e12, 1200e9, 50e9, 50e9 / 8),
    "v5e": Speeds(197e12, 819e9, 50e9, 25e9 / 8),
    "v5p": Speeds(459e12, 2765e9, 100e9, 50e9 / 8),
    "v6e": Speeds(918e12, 1638e9, 100e9, 100e9 / 8),
    "tpu7x": Speeds(2307e12, 7380e9, 100e9, 100e9 / 8),
}


@dataclass(frozen=True)
class Estimate:
    """Seconds of one execution: instructions one after the other, and collectives one after the other."""

    compute: float
    communication: float

    @property
    def apart(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.communication

    @property
    def overlapped(self) -> float:
        """All communication that can hide behind arithmetic does."""
        return max(self.compute, self.communication)

    def mixed(self, other: "Estimate", share: float) -> "Estimate":
        """The mean over executions of which this share takes as long as this one, and the others as the other."""
        rest = 1 - share
        return Estimate(
            share * self.compute + rest * other.compute, share * self.communication + rest * other.communication
        )


@dataclass(frozen=True)
class Wires:
    """What connects the devices of one group.

    Attributes:
      members: devices of the group within one slice.
      slices: over how many slices it goes.
      bandwidth: bytes/s at which one device can give and take at once, as the bound on rings counts it.
      hops: from one device to the farthest.
    """

    members: int
    slices: int
    bandwidth: float
    hops: int


def speeds(topology: Topology) -> Speeds:
    """Of one JAX device: a TPU7x chip is two."""
    chip, share = SPEEDS[topology.kind], topology.generation.devices_per_chip
    return Speeds(chip.flops / share, chip.hbm / share, chip.link / share, chip.network / share)


def estimate(program: str | Program, mesh: Any, topology: Topology) -> Estimate:
    """Of a compiled program on the mesh it was compiled for, whose devices know their coordinates."""
    speed = speeds(topology)
    compute = math.fsum(x.count * max(x.passes / speed.flops, x.bytes / speed.hbm) for x in work(program))
    return Estimate(compute, communication(collectives(program, mesh), mesh, topology))


def communication(found: Iterable[Collective], mesh: Any, topology: Topology) -> float:
    """Seconds of collectives, one after the other."""
    speed = speeds(topology)
    return math.fsum(x.count * collective_seconds(x, wires(x.axes, mesh, topology), speed.network) for x in found)


def collective_seconds(found: Collective, between: Wires, network: float) -> float:
    """Of one run: within the slices, and of what each device then holds of it between them.

    An all-gather of B bytes takes B (n - 1) / n of a ring's bandwidth, a reduce-scatter as much, an all-reduce both;
    an all-to-all has a quarter of that to carry on average, of n times what each device puts in.
    """
    rounds = 2 if found.kind == "all-reduce" else 1
    size: float = found.bytes
    if "all-to-all" in found.kind:
        size *= between.members * between.slices / 4
    seconds = START_SECONDS + rounds * HOP_SECONDS * between.hops
    if between.members > 1:
        share = 1.0 if found.kind == "collective-permute" else (between.members - 1) / between.members
        seconds += rounds * size * share / between.bandwidth
    if between.slices > 1:
        across = size / between.members * (between.slices - 1) / between.slices
        seconds += rounds * (across / network + SLICE_SECONDS)
    return seconds


def wires(axes: tuple[str, ...], mesh: Any, topology: Topology) -> Wires:
    """The links of a group of devices that differ along these axes of the mesh.

    Along each dimension of the interconnect in which the group lies, a ring has two links and a line one. Where the
    group takes only every s-th chip, s such groups share the links.
    """
    places = tuple(slice(None) if name in axes else 0 for name in mesh.shape)
    group = np.asarray(mesh.devices[places], dtype=object).ravel()
    coordinates = np.array([device.coords for device in group])
    slices = len({getattr(device, "slice_index", 0) for device in group})
    bandwidth, hops, link = 0.0, 0, speeds(topology).link
    for dimension, length in enumerate(topology.shape):
        taken = np.unique(coordinates[:, dimension])
        if len(taken) == 1:
            continue
        stride = math.ceil((taken[-1] - taken[0] + 1) / len(taken))
        ring = topology.wraps(dimension) and len(taken) * stride == length
        bandwidth += (2 if ring else 1) * link / stride
        hops += stride * (len(taken) // 2 if ring else len(taken) - 1)
    members = len(group) // slices
    return Wires(members, slices, bandwidth or 2 * link, hops)
