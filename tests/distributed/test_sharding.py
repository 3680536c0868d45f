"""One state and one step, however they are spread: every leaf on the mesh, the same rows chosen, the same losses."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from training.test_step import Run, config

from opus_jax.distributed.mesh import AXES
from opus_jax.training.checkpoint import Checkpoints
from opus_jax.training.scoring import is_directed
from opus_jax.training.state import abstract_state, state_shardings

MESHES = {
    "data": ("mesh.data=8",),
    "fsdp": ("mesh.fsdp=8",),
    "three": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    "replica": ("mesh.replica=2", "mesh.data=2", "mesh.fsdp=2"),
}
PAIRS = ("selection.redundancy=1.0", "selection.direction=adamw_frozen", "selection.temperature=0")
ENGINES = {
    "directional": (),
    "ghost": ("selection.engine=ghost", "selection.sketch=kron", "selection.sketch_width=1024", *PAIRS),
    "per_example": (
        "selection.engine=per_example", "selection.sketch=count", "selection.sketch_width=512",
        "selection.sketched_utilities=true", *PAIRS,
    ),
    "muon": ("optimizer.name=muon", "model.layers=3"),
}  # fmt: skip

PLACES = {  # of every engine two meshes, on every mesh two engines
    "directional": ("replica", "fsdp"), "ghost": ("three", "data"), "per_example": ("fsdp", "data"),
    "muon": ("three", "replica"),
}  # fmt: skip
ALL = [(engine, mesh) for engine, meshes in PLACES.items() for mesh in meshes]


@pytest.mark.slow  # fast neighbours are in test_step.py and test_step_engines.py
@pytest.mark.parametrize(("engine", "mesh"), ALL)
def test_eight_devices_do_what_one_does(engine: str, mesh: str) -> None:
    whole, (split, run) = one_device(engine), history(engine, 8, *MESHES[mesh])
    for one, eight in zip(whole, split, strict=True):
        np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(eight["row_loss"], one["row_loss"], rtol=1e-4)
    np.testing.assert_array_equal(split[-1]["indices"], whole[-1]["indices"])
    assert not whole[-1]["selected_at_random"]
    on_the_mesh(run.state, state_shardings(run.spec, run.optimizer, run.mesh, directed=True), run.mesh)


@functools.cache
def one_device(engine: str) -> list[dict[str, np.ndarray]]:
    return history(engine, 1)[0]


def history(engine: str, devices: int, *mesh: str) -> tuple[list[dict[str, np.ndarray]], Run]:
    run = Run(config(*ENGINES[engine], *mesh), devices)
    return run.go(2), run


@pytest.mark.parametrize("mesh", ["three", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_every_leaf_of_the_state_has_its_place(mesh: str, tmp_path: Any) -> None:
    """Scalars of the optimizer too; as it is made, and as it is read from a checkpoint. After a step: above."""
    run = Run(config("optimizer.name=muon", *MESHES[mesh]), devices=8)
    wanted = state_shardings(run.spec, run.optimizer, run.mesh, directed=True)
    on_the_mesh(run.state, wanted, run.mesh)
    with Checkpoints(tmp_path / "checkpoints", 1, False) as checkpoints:
        checkpoints.save(1, run.state, {"plan": np.zeros(1)}, {})
    like = abstract_state(run.spec, run.optimizer, run.mesh, directed=is_directed(run.config))
    with Checkpoints(tmp_path / "checkpoints", 1, False) as checkpoints:
        restored = checkpoints.restore(like)
    assert restored is not None
    on_the_mesh(restored[1], wanted, run.mesh)


def on_the_mesh(state: Any, wanted: Any, mesh: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path)
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding), name
        assert leaf.sharding.mesh == mesh, name
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), name
    assert tuple(mesh.axis_names) == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
