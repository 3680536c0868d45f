"""Collectives read from the text of compiled programs: written by hand, and compiled for 8 CPU devices."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opus_jax.distributed.hlo import Collective, collectives, device_groups, sites, spanned_axes
from opus_jax.distributed.hlo_text import parse

MESH: Any = SimpleNamespace(shape={"data": 2, "fsdp": 4})

LOOPS = """HloModule jit_step, num_partitions=8

%inner (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,128]{1,0}) tuple(%i, /*index=1*/%sum)
}

%below (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %three = s32[] constant(3)
  %at = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%at, %three), direction=LT
}

%layer (q: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %q = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %again = (s32[], f32[8,128]{1,0}) while(%q), condition=%below, body=%inner
  %y = f32[8,128]{1,0} get-tuple-element(%again), index=1
  %start = (f32[8,128]{1,0}, f32[16,128]{1,0}) all-gather-start(%y), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %done = f32[16,128]{1,0} all-gather-done(%start), metadata={op_name="jit(step)/gather (rows)"}
  ROOT %w = (s32[], f32[8,128]{1,0}) tuple(%q, %y)
}

%seldom (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} negate(%a)
  ROOT %moved = f32[8,128]{1,0} collective-permute(%b), source_target_pairs={{0,0},{1,5},{5,1}}
}

%often (c: f32[8,128]) -> f32[8,128] {
  ROOT %c = f32[8,128]{1,0} parameter(0)
}

%scatter (d: bf16[64,8]) -> bf16[16,8] {
  %d = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all = bf16[64,8]{1,0} all-reduce(%d), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add
  %place = s32[] constant(0)
  ROOT %part = bf16[16,8]{1,0} dynamic-slice(%all, %place, %place), dynamic_slice_sizes={16,8}
}

ENTRY %main (e: f32[8,128], f: bf16[64,8], g: s32[]) -> f32[8,128] {
  %e = f32[8,128]{1,0} parameter(0)
  %f = bf16[64,8]{1,0} parameter(1)
  %g = s32[] parameter(2)
  %h = (s32[], f32[8,128]{1,0}) tuple(%g, %e)
  %loop = (s32[], f32[8,128]{1,0}) while(%h), condition=%x, body=%layer, backend_config={"known_trip_count":{"n":"12"}}
  %reduce-scatter.3 = bf16[16,8]{1,0} fusion(%f), kind=kCustom, calls=%scatter
  %alone = f32[8,128]{1,0} all-reduce(%e), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %either = f32[8,128]{1,0} conditional(%g, %e, %e), branch_computations={%seldom, %often}
}
"""


def test_counts_are_multiplied_by_the_trips_of_nested_loops():
    size = 8 * 128 * 4
    assert collectives(LOOPS, MESH) == [
        Collective("all-gather", ("data",), 2 * size, 12),
        Collective("all-reduce", ("fsdp",), size, 36),
        Collective("collective-permute", ("data",), size, 1),
        Collective("reduce-scatter", ("fsdp",), 64 * 8 * 2, 1),
    ]


def test_where_a_collective_comes_from_is_kept():
    gather = next(site for site in sites(LOOPS, MESH) if site.kind == "all-gather")
    assert gather.count == 12
    assert parse(LOOPS).computations["layer"]["done"].op_name == "jit(step)/gather (rows)"


def test_of_a_conditional_one_branch_runs():
    program = parse(LOOPS)
    assert program.runs["seldom"] == 1
    assert "often" not in program.runs
    shortest = dataclasses.replace(program, longest=False)
    assert shortest.runs["often"] == 1
    assert "collective-permute" not in {found.kind for found in collectives(shortest, MESH)}


def test_a_loop_without_a_stated_end_counts_once_and_is_named():
    endless = LOOPS.replace("direction=LT", "direction=NE")
    assert parse(endless).unknown_loops == ["again"]
    assert parse(LOOPS).unknown_loops == []
    assert Collective("all-reduce", ("fsdp",), 8 * 128 * 4, 12) in collectives(endless, MESH)


def test_what_goes_to_other_slices_lies_along_the_first_axis():
    """As libtpu writes it: the program is of one slice's four chips, and hosts carry the rest."""
    attributes = 'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="%s"}'
    text = (
        "HloModule jit_step, is_scheduled=true, num_partitions=4\n\n"
        "ENTRY %main (a: f32[32,128]) -> f32[128,128] {\n"
        "  %a = f32[32,128]{1,0:T(8,128)} parameter(0)\n"
        "  %t = token[] after-all()\n"
        f"  %send = (f32[32,128]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=2, {attributes % 'ALL_REDUCE'}\n"
        f"  %recv = (f32[32,128]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {attributes % 'ALL_REDUCE'}\n"
        f"  %send.1 = (f32[32,128]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=4, {attributes % 'ALL_GATHER'}\n"
        "  ROOT %whole = f32[128,128]{1,0} all-gather(%a), replica_groups={}, dimensions={0}\n}\n"
    )
    size = 32 * 128 * 4
    assert collectives(text, SimpleNamespace(shape={"replica": 2, "data": 4})) == [
        Collective("all-gather", ("data",), 4 * size, 1),
        Collective("all-gather", ("replica",), 2 * size, 1),
        Collective("all-reduce", ("replica",), size, 1),
    ]


@pytest.mark.parametrize(
    ("groups", "first", "axes"),
    [
        ("replica_groups={}", [0, 1, 2, 3, 4, 5, 6, 7], ("data", "fsdp")),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [0, 4], ("data",)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3], ("fsdp",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [0, 4], ("data",)),
        ("replica_groups=[1,8]<=[8]", [0, 1, 2, 3, 4, 5, 6, 7], ("data", "fsdp")),
        ("replica_groups=mesh['x'=8,'y'=1] {'x','y'}, to_apply=%a", [0, 1, 2, 3, 4, 5, 6, 7], ("data", "fsdp")),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", [0, 4], ("data",)),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'y','z'}", [0, 1, 2, 3], ("fsdp",)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", [0, 4], ("data",)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, b={(1)}", [0, 1, 2, 3], ("fsdp",)),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=(4,5,6,7,0,1,2,3) {'y'}", [4, 5, 6, 7], ("fsdp",)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", [0, 2], ("fsdp",)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", [0, 1], ("fsdp",)),
        ("source_target_pairs={{0,0},{1,2},{2,1}}", [1, 2], ("fsdp",)),
    ],
)
def test_groups_of_devices_in_every_form(groups, first, axes):
    found = device_groups(groups, 8)
    assert found[0].tolist() == first
    assert spanned_axes(found, MESH) == axes


def test_groups_that_cannot_be_read_are_an_error_not_a_guess():
    with pytest.raises(ValueError, match="names no devices"):
        device_groups("replica_groups=unheard_of", 8)


def test_what_the_compiler_makes_of_shardings_is_found_again():
    """Also under the compiler that Python 3.12 gets: the forms above are what they were seen to write."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def arrange(*names: str | None) -> Any:
        return NamedSharding(mesh, P(*names))

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=arrange("data", None))
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=arrange(None, "fsdp", None))

    def layers(x: Any, w: Any) -> Any:
        whole = lambda one: jax.lax.with_sharding_constraint(one, arrange(None, None))  # noqa: E731
        out = jax.lax.scan(lambda y, one: (jnp.tanh(y @ whole(one)), None), x, w)[0]
        return out.sum()

    with jax.set_mesh(mesh):
        text = jax.jit(layers, out_shardings=arrange()).lower(x, w).compile().as_text()
    found = collectives(text, mesh)
    gathers = [x for x in found if x.kind == "all-gather"]
    assert sum(x.moved for x in gathers) == 5 * 64 * 64 * 4
    assert {x.axes for x in gathers} == {("fsdp",)}
    assert [(x.axes, x.bytes) for x in found if x.kind == "all-reduce"] == [(("data",), 4)]


def test_shapes_know_their_bytes_and_memory():
    (line,) = parse(
        "ENTRY %m (a: s4[3,5]) -> f8e4m3fn[2] {\n"
        "  %c = (s4[4,8]{1,0:T(8,128)S(1)}, pred[3], (bf16[2,3]{1,0}, u64[])) custom-call(), custom_call_target=\"x\"\n"
        "}\n"
    ).computations["m"].values()  # fmt: skip
    assert [shape.bytes for shape in line.shapes] == [16, 3, 12, 8]
    assert [shape.space for shape in line.shapes] == [1, 0, 0, 0]
    assert np.prod(line.shapes[2].dims) == line.shapes[2].size
