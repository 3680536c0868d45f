"""The real TPU compiler takes the kernels, for slices that are not there, and no gradient is in the program."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from opus_jax.distributed.topology import compiler_environment, parse_topology

with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux x86-64 only"
)

N, T, D, F = 8, 128, 256, 640  # over two ways of the batch axes and two of "tensor"

# Compiles all forms for the slice named by the argument, by the platform of the mesh; the default device is a CPU.
CHILD = f"""
import json, re, sys
from collections import Counter
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from opus_jax.distributed.hlo import collectives
from opus_jax.distributed.mesh import AXES
from opus_jax.distributed.topology import absent_devices, parse_topology
from pallas_kernels.count_sketch.api import count_sketch
from pallas_kernels.ghost_sketch.api import CountFold, KronFold, ghost_sketch

devices = np.array(absent_devices(parse_topology(sys.argv[1]))[:4]).reshape(1, 2, 1, 2)
mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)

def shape(sizes, dtype=jnp.float32, *spec):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

def figures(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    return {{
        "calls": text.count('custom_call_target="tpu_custom_call"'),
        "gradients": re.findall(r"\\w+\\[\\d+,{D},(?:{F}|{F // 2})\\]", text),
        "flops": compiled.cost_analysis()["flops"],
        "collectives": Counter(x.kind for x in collectives(text, mesh)),
    }}

a, b = shape(({N}, {T}, {D}), jnp.bfloat16, "data"), shape(({N}, {T}, {F}), jnp.bfloat16, "data", None, "tensor")
matrix = shape(({D}, {F}), jnp.float32, None, "tensor")
left, right, seed = shape((4, {D}, 32)), shape((4, {F}, 32)), shape((), jnp.uint32)
axes = (None, "tensor")
with jax.set_mesh(mesh):
    answer = {{
        "count": figures(lambda a, b, seed, s, v: ghost_sketch(
            a, b, CountFold(seed, 8, 128), scale=s, direction=v, axes=axes), a, b, seed, matrix, matrix),
        "kron": figures(lambda a, b, l, r, s, v: ghost_sketch(
            a, b, KronFold(l, r), scale=s, direction=v, axes=axes), a, b, left, right, matrix, matrix),
        "plain": figures(lambda a, b, l, r: ghost_sketch(a, b, KronFold(l, r), axes=axes)[0], a, b, left, right),
        "matrices": figures(lambda x, seed: count_sketch(x, seed, 1000, axes=axes),
            shape(({N}, {D}, {F}), jnp.float32, "data", None, "tensor"), seed),
        "vectors": figures(lambda x, seed: count_sketch(x, seed, 1024), shape(({N}, 1, 5000)), seed),
    }}
print(json.dumps(answer))
"""

# Compiles real layers with the blocks of the table on one device, so that a table that asks too much VMEM is found.
LAYERS_CHILD = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from opus_jax.distributed.topology import absent_devices, parse_topology
from pallas_kernels.count_sketch.api import count_sketch
from pallas_kernels.ghost_sketch.api import CountFold, KronFold, ghost_sketch
from pallas_kernels.ghost_sketch.cases import LAYERS

mesh = Mesh(absent_devices(parse_topology(sys.argv[1]))[:1], ("data",), axis_types=(AxisType.Auto,))
whole = NamedSharding(mesh, PartitionSpec())
shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)
calls = {}
with jax.set_mesh(mesh):
    for case in LAYERS:
        tokens = [shape(case.n, case.t, size, dtype=jnp.bfloat16) for size in (case.d, case.f)]
        matrix, seed = shape(case.d, case.f), shape(dtype=jnp.uint32)
        factors = shape(4, case.d, 32), shape(4, case.f, 32)
        for kind, make, parts in (
            ("count", lambda seed: CountFold(seed, 8, 1024), (seed,)), ("kron", KronFold, factors)
        ):
            run = jax.jit(lambda a, b, s, v, *parts: ghost_sketch(a, b, make(*parts), scale=s, direction=v))
            text = run.lower(*tokens, matrix, matrix, *parts).compile().as_text()
            calls[f"{case.name} {kind}"] = text.count('custom_call_target="tpu_custom_call"')
        run = jax.jit(lambda x, seed: count_sketch(x, seed, 8192))
        text = run.lower(shape(2, case.d, case.f), seed).compile().as_text()
        calls[f"{case.name} matrices"] = text.count('custom_call_target="tpu_custom_call"')
print(json.dumps(calls))
"""


def compiled_for(name, program=CHILD):
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        env=os.environ | compiler_environment(parse_topology(name)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(figures):
    assert {name: figures[name]["calls"] for name in figures} == {
        "count": 1,
        "kron": 1,
        "plain": 0,  # projections are left to XLA
        "matrices": 1,
        "vectors": 1,
    }
    for name in ("count", "kron", "plain"):
        assert figures[name]["gradients"] == []
        assert figures[name]["collectives"]["all-reduce"] in (1, 2)  # the sketch, and the inner product
    assert figures["matrices"]["gradients"] != []  # the pattern does find one where it is
    entries = N // 2 * D * F // 2  # of one device
    assert figures["count"]["flops"] == pytest.approx(entries * (2 * T + 3 + 2), rel=0.02)
    assert figures["kron"]["flops"] == pytest.approx(entries * (2 * T + 3 + 2 * 128 * (1 + 128 / D)), rel=0.02)


@with_libtpu
def test_compiled_for_v5e_and_v5p():
    with ThreadPoolExecutor(2) as pool:
        for figures in pool.map(compiled_for, ["v5e:2x2", "v5p:2x2x1"]):
            check(figures)


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiled_for_the_others(name):
    check(compiled_for(name))


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"])
def test_real_layers_fit_with_the_blocks_of_the_table(name):
    calls = compiled_for(name, LAYERS_CHILD)
    assert len(calls) == 12
    assert set(calls.values()) == {1}
