import math

import pytest

from opus_jax.distributed.topology import FLAT_SHAPES, GENERATIONS, SMALL_BOXES, compiler_environment, parse_topology
from opus_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips", "devices", "accelerator"),
    [
        ("v5p:2x2x4", 16, 16, "v5p-32"),
        ("v5e:4x4", 16, 16, "v5litepod-16"),
        ("v6e:2x4", 8, 8, "v6e-8"),
        ("v4:2x2x2", 8, 8, "v4-16"),
        ("tpu7x:2x2x1", 4, 8, "tpu7x-8"),
        ("V5P:4x8x8 ", 256, 256, "v5p-512"),
    ],
)
def test_a_slice_is_read(name, chips, devices, accelerator):
    topology = parse_topology(name)
    assert (topology.chips, topology.devices, topology.accelerator_type) == (chips, devices, accelerator)
    assert parse_topology(topology.name) == topology


def test_slices_are_equal_and_lent_one_by_one():
    two = parse_topology("v5p:2x2x4", slices=2)
    assert (two.name, two.chips, two.devices, two.accelerator_type) == ("2 x v5p:2x2x4", 32, 32, "v5p-32")
    assert parse_topology(two.slice_name, slices=2) == two
    with pytest.raises(UserError, match="0 slices: must be at least 1"):
        parse_topology("v5p:2x2x4", slices=0)


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:2x2x4", [False, False, False]),
        ("v5p:4x4x8", [True, True, True]),
        ("v5e:8x16", [False, True]),
        ("v6e:8x8", [False, False]),
    ],
)
def test_cubes_and_sides_of_a_pod_are_rings(name, rings):
    topology = parse_topology(name)
    assert [topology.wraps(dimension) for dimension in range(len(rings))] == rings


def test_every_listed_shape_exists():
    for name, generation in GENERATIONS.items():
        for shape in FLAT_SHAPES if generation.axes == 2 else SMALL_BOXES:
            assert parse_topology(f"{name}:{'x'.join(map(str, shape))}").chips == math.prod(shape)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("v5p", "GENERATION:SHAPE"),
        ("v5p:", "GENERATION:SHAPE"),
        ("v5p:16", "GENERATION:SHAPE"),
        ("v5:2x2x1", "must be one of v4, v5e, v5p, v6e, tpu7x"),
        ("v5e:2x2x4", "2x2, 2x4, 4x4"),
        ("v5e:3x4", "2x2, 2x4, 4x4"),
        ("v5p:2x2", "2x2x1, 2x2x2"),
        ("v5p:8x4x4", "ascending multiples of 4"),
        ("v5p:0x4x4", "ascending multiples of 4"),
        ("v5p:16x16x28", "up to 6144 chips"),
        ("v4:16x16x20", "up to 4096 chips"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_what_does(name, part):
    with pytest.raises(UserError, match="topology") as refused:
        parse_topology(name)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_two_compilers_may_load_libtpu_at_once():
    environment = compiler_environment(parse_topology("v5e:2x2"))
    assert environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert environment["JAX_PLATFORMS"] == "cpu"
