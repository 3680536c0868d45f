"""Rows on their way from the host to the devices of several processes."""

import numpy as np
import pytest
from several_processes import ends, start

from opus_jax.config import MeshConfig
from opus_jax.distributed.mesh import make_mesh
from opus_jax.training.feed import put_rows, rows_held

# Two processes of two devices; those of one process are not neighbours in the mesh, as on many TPU slices.
APART = """
import jax
import numpy as np
from jax.experimental import multihost_utils
from opus_jax.config import MeshConfig
from opus_jax.distributed.mesh import make_mesh
from opus_jax.distributed.processes import start_processes
from opus_jax.training.feed import DEVICE_FIELDS, put_rows, rows_held

start_processes()
first, second, third, fourth = jax.devices()
whole = np.arange(24).reshape(8, 3)
for mesh in (MeshConfig(), MeshConfig(tensor=2)):
    mesh = make_mesh(mesh, [first, third, second, fourth])
    held = rows_held(mesh, 8)
    mine, all_rows = ({name: rows for name in DEVICE_FIELDS} for rows in (whole[held], whole))
    for batch in (put_rows(mine, mesh, 8), put_rows(all_rows, mesh)):
        assert multihost_utils.process_allgather(batch["tokens"], tiled=True).tolist() == whole.tolist()
    print(held.tolist())
"""


@pytest.mark.slow
def test_each_process_puts_the_rows_of_its_own_devices_wherever_these_are_in_the_mesh() -> None:
    found = ends(start(2, "-c", APART, devices=2), limit=120)
    assert [code for code, _, _ in found] == [0, 0], found
    held = [
        [line for line in output.splitlines() if line.startswith("[") and "Gloo" not in line] for _, output, _ in found
    ]
    everything = str(list(range(8)))
    assert held == [["[0, 1, 4, 5]", everything], ["[2, 3, 6, 7]", everything]]


def test_one_process_holds_all_rows() -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    assert rows_held(mesh, 8).tolist() == list(range(8))
    rows = np.arange(24).reshape(8, 3)
    batch = put_rows({"tokens": rows, "segment_ids": rows, "loss_mask": rows}, mesh, 8)
    assert np.array_equal(batch["tokens"], rows)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 3)}
