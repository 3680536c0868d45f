"""Expected times against formulas worked out by hand, on devices that are only coordinates."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from opus_jax.distributed.hlo import Collective
from opus_jax.distributed.roofline import (
    HOP_SECONDS,
    SLICE_SECONDS,
    SPEEDS,
    START_SECONDS,
    Estimate,
    collective_seconds,
    communication,
    estimate,
    speeds,
    wires,
)
from opus_jax.distributed.topology import GENERATIONS, parse_topology

LINK = 100e9


def mesh_of(topology, **axes):
    """Chips in the order x fastest, as one host after the other would come on a slice two wide."""
    shape = topology.shape
    coordinates = [tuple(reversed(at)) for at in itertools.product(*(range(size) for size in reversed(shape)))]
    devices = [
        SimpleNamespace(coords=at, slice_index=one) for one in range(topology.slices) for at in coordinates
    ]  # fmt: skip
    placed = np.empty(len(devices), object)
    placed[:] = devices
    return SimpleNamespace(shape=axes, devices=placed.reshape(tuple(axes.values())))


def test_every_generation_has_its_speeds():
    assert set(SPEEDS) == set(GENERATIONS)
    whole, half = SPEEDS["tpu7x"], speeds(parse_topology("tpu7x:2x2x1"))
    assert half.flops == whole.flops / 2, "a device is half a chip"


def test_a_cube_is_rings_and_a_smaller_box_lines():
    cube, box = parse_topology("v5p:4x4x4"), parse_topology("v5p:2x2x2")
    all_of = wires(("data",), mesh_of(cube, data=64, fsdp=1), cube)
    assert (all_of.members, all_of.bandwidth, all_of.hops) == (64, 6 * LINK, 6)
    plane = wires(("fsdp",), mesh_of(cube, data=4, fsdp=16), cube)
    assert (plane.members, plane.bandwidth, plane.hops) == (16, 4 * LINK, 4)
    pair = wires(("data",), mesh_of(box, data=2, fsdp=4), box)
    assert (pair.members, pair.bandwidth, pair.hops) == (2, LINK, 1)


def test_groups_that_take_every_other_chip_share_the_links():
    cube = parse_topology("v5p:4x4x4")
    spread = wires(("data",), mesh_of(cube, data=32, fsdp=2), cube)
    assert spread.bandwidth == pytest.approx((2 / 2 + 2 + 2) * LINK)
    assert spread.hops == 2 * 1 + 2 + 2


def test_an_all_reduce_goes_round_twice_and_latency_counts():
    between = wires(("data",), mesh_of(cube := parse_topology("v5p:4x4x4"), data=64, fsdp=1), cube)
    once = collective_seconds(Collective("all-gather", ("data",), 6 * 10**9, 1), between, network=1.0)
    assert once == pytest.approx(START_SECONDS + 6 * HOP_SECONDS + 0.01 * 63 / 64)
    twice = collective_seconds(Collective("all-reduce", ("data",), 6 * 10**9, 1), between, network=1.0)
    assert twice - START_SECONDS == pytest.approx(2 * (once - START_SECONDS))


def test_between_slices_goes_what_each_device_holds_then():
    two = parse_topology("v5p:2x2x2", slices=2)
    mesh = mesh_of(two, replica=2, data=8)
    alone = wires(("replica",), mesh, two)
    assert (alone.members, alone.slices) == (1, 2)
    size, network = 8 * 10**9, speeds(two).network
    found = Collective("all-reduce", ("replica",), size, 1)
    assert collective_seconds(found, alone, network) == pytest.approx(
        START_SECONDS + 2 * (size / 2 / network + SLICE_SECONDS)
    )
    both = wires(("replica", "data"), mesh, two)
    assert (both.members, both.slices) == (8, 2)
    assert collective_seconds(found, both, network) < collective_seconds(found, alone, network) / 4


def test_collectives_come_one_after_the_other():
    box = parse_topology("v5p:2x2x2")
    mesh = mesh_of(box, data=8)
    one = Collective("all-gather", ("data",), 10**6, 1)
    many = [Collective("all-gather", ("data",), 10**6, 5), one]
    assert communication(many, mesh, box) == pytest.approx(6 * communication([one], mesh, box))
    assert communication([], mesh, box) == 0


def test_an_instruction_takes_the_longer_of_arithmetic_and_traffic():
    box = parse_topology("v5p:2x2x2")
    text = (
        "ENTRY %m (a: bf16[8192,8192]) -> bf16[8192,8192] {\n"
        "  %a = bf16[8192,8192]{1,0} parameter(0)\n"
        "  %b = bf16[8192,8192]{1,0} negate(%a)\n"
        "  ROOT %c = bf16[8192,8192]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    )
    expected = 2 * 2 * 8192**2 / 2765e9 + 2 * 8192**3 / 459e12
    found = estimate(text, mesh_of(box, data=8), box)
    assert (found.compute, found.communication) == (pytest.approx(expected), 0)


def test_overlap_hides_the_shorter():
    assert Estimate(3.0, 1.0).apart == 4.0
    assert Estimate(3.0, 1.0).overlapped == 3.0
    assert Estimate(3.0, 1.0).mixed(Estimate(1.0, 0.0), 0.25) == Estimate(1.5, 0.25)
