"""What choosing rows adds to a step's communication: one gradient's reduction, a few scalars of each candidate, and
the integers of rows, of which a chip sends and receives as many on a small slice as on a large one."""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed.compiled_steps import TOKENS, Program, program

from opus_jax.distributed.topology import compiler_environment, parse_topology

FIELDS = 3  # tokens, segments and the mask of a row, 4 bytes each
SCALARS = 10  # numbers of every candidate that are made known to all, at most
ROWS = ("all-to-all", "ragged-all-to-all")  # kinds of the exchange of rows within a slice


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("replica_data_fsdp", ("replica", "data")),
        pytest.param("data", ("data",), marks=pytest.mark.slow),
        pytest.param("data_fsdp_tensor", ("data",), marks=pytest.mark.slow),
    ],
)
def test_choosing_moves_rows_and_scalars_across_the_data_axes(name, axes):
    choosing, plain = program(name), program(name, chooses=False)
    moved, rows = apart(choosing, axes)
    gradient = sum(x.moved for x in plain.across(*axes))  # the update's, and its loss and norm
    assert {x.kind for x in plain.across(*axes)} <= {"all-reduce", "all-gather"}
    scalars = sum(x.moved for x in moved) - 2 * gradient  # the proxy's and the update's
    candidates = choosing.config.candidates
    assert 0 < scalars <= SCALARS * candidates * 4
    assert all(x.bytes <= candidates * 4 for x in moved if x.kind == "all-gather"), "nothing else is made known to all"
    exchange, *between = rows
    assert exchange.moved == choosing.config.batch.rows * FIELDS * TOKENS * 4
    assert [x.axes for x in between] == [("replica",)] * ("replica" in axes)


def test_slices_exchange_gradients_scalars_and_a_few_rows():
    """Over `replica`, the network between slices: rows for two slices, of which a device trains on one each."""
    (between,) = apart(program("replica_data_fsdp"), ("replica",))[1]
    assert between.moved == 2 * FIELDS * TOKENS * 4


def apart(choosing: Program, axes: tuple[str, ...]) -> tuple[list, list]:
    """(everything else, the exchange of rows) across the axes; between slices rows are added to zeros."""
    of_rows = lambda x: x.kind in ROWS or (x.kind, x.axes) == ("reduce-scatter", ("replica",))  # noqa: E731
    found = choosing.across(*axes)
    return [x for x in found if not of_rows(x)], [x for x in found if of_rows(x)]


# ------------------------------------------------------------------------------------------- absent TPUs

STEP = """
import dataclasses, json, sys
from opus_jax.config import from_mapping
from opus_jax.distributed.hlo import collectives
from opus_jax.distributed.mesh import make_mesh
from opus_jax.distributed.topology import absent_devices, parse_topology
from opus_jax.models.presets import resolve
from opus_jax.training.batches import abstract_batch
from opus_jax.training.build import optimizer_for
from opus_jax.training.state import abstract_state
from opus_jax.training.step import make_step

devices, tokens = absent_devices(parse_topology(sys.argv[1])), 256
rows = 2 * len(devices)
config = from_mapping({
    "model": {"preset": "tiny", "layers": 2, "vocab_size": 512, "dtype": "bfloat16"}, "corpus": {"row_tokens": tokens},
    "batch": {"rows": rows}, "proxy": {"rows": rows}, "selection": {"warm_start_steps": 1}, "mesh": {"fsdp": 2},
})
mesh, spec = make_mesh(config.mesh, devices), resolve(config.model, 512, tokens)
optimizer = optimizer_for(spec, config)
found = []
for chooses in (True, False):
    state = abstract_state(spec, optimizer, mesh, directed=True)
    candidates = abstract_batch(2 * rows if chooses else rows, tokens, mesh)
    proxy = abstract_batch(rows, tokens, mesh) if chooses else None
    step = make_step(spec, optimizer, config, mesh, chooses=chooses)
    text = step.lower(state, candidates, proxy).compile().as_text()
    found.append([dataclasses.asdict(x) for x in collectives(text, mesh) if "data" in x.axes])
print(json.dumps(found))
"""


def across_data(topology: str) -> tuple[int, int]:
    """Bytes of one chip across the data axis: (of rows, of everything but rows and two gradients)."""
    environment = os.environ | compiler_environment(parse_topology(topology))
    done = subprocess.run([sys.executable, "-c", STEP, topology], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    choosing, plain = json.loads(done.stdout.splitlines()[-1])
    size = lambda found, rows: sum(x["bytes"] * x["count"] for x in found if (x["kind"] in ROWS) is rows)  # noqa: E731
    assert size(plain, True) == 0
    return size(choosing, True), size(choosing, False) - 2 * size(plain, False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu exists for Linux x86-64 only")
def test_a_chip_moves_as_much_for_selection_in_a_slice_of_8_as_of_64():
    """At 4 candidates a chip. The scalars of all candidates grow with the slice, and are small beside the rows."""
    with ThreadPoolExecutor(2) as pool:
        (rows_8, scalars_8), (rows_64, scalars_64) = pool.map(across_data, ["v5p:2x2x2", "v5p:4x4x4"])
    row = FIELDS * 256 * 4
    assert 6 * row <= rows_8 <= 7 * row, "the 4 rows that it holds, the 2 that it gets, and the plan"
    assert rows_64 <= rows_8 + 4 * 64 * 4, "the plan has a place for every chip"
    assert 0 <= scalars_8 <= SCALARS * 32 * 4
    assert 0 <= scalars_64 <= SCALARS * 256 * 4
    assert (rows_64 + scalars_64) / (rows_8 + scalars_8) < 1.5
