"""The step of a small model, compiled for eight virtual devices on four meshes: what the tests of sharding read."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from training.test_step import TOKENS, config

from opus_jax.config import Config
from opus_jax.distributed.hlo import Collective, collectives
from opus_jax.distributed.mesh import make_mesh
from opus_jax.models.presets import ModelSpec, resolve
from opus_jax.optim.optimizers import Optimizer
from opus_jax.training.batches import abstract_batch
from opus_jax.training.build import optimizer_for
from opus_jax.training.state import TrainState, abstract_state
from opus_jax.training.step import make_step

DEVICES = 8
STEPS = {
    "data": ("mesh.data=8",),
    "fsdp": ("mesh.fsdp=8", "optimizer.name=muon"),
    "data_fsdp_tensor": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "optimizer.name=muon"),
    "replica_data_fsdp": ("mesh.replica=2", "mesh.data=2", "mesh.fsdp=2"),
}


@dataclass(frozen=True)
class Program:
    """A compiled step, and what it was compiled for."""

    config: Config
    mesh: Mesh
    collectives: list[Collective]

    def across(self, *axes: str) -> list[Collective]:
        """Those that leave a part of the mesh in which these axes do not change."""
        return [x for x in self.collectives if set(axes) & set(x.axes)]


def shardings(name: str) -> dict[str, str]:
    """How every leaf of the state lies, by its name."""
    parts = _parts(name)
    leaves = jax.tree_util.tree_leaves_with_path(parts.state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): _spec(leaf) for path, leaf in leaves}


@functools.cache
def program(name: str, *, chooses: bool = True) -> Program:
    parts = _parts(name)
    config, mesh = parts.config, parts.mesh
    step = make_step(parts.spec, parts.optimizer, config, mesh, chooses=chooses)
    rows = abstract_batch(config.candidates if chooses else config.batch.rows, TOKENS, mesh)
    proxy = abstract_batch(config.proxy.rows, TOKENS, mesh) if chooses else None
    text = step.lower(parts.state, rows, proxy).compile().as_text()
    return Program(config, mesh, collectives(text, mesh))


@dataclass(frozen=True)
class _Parts:
    config: Config
    mesh: Mesh
    spec: ModelSpec
    optimizer: Optimizer
    state: TrainState


def _parts(name: str) -> _Parts:
    settings = config("model.layers=2", *STEPS[name])
    mesh = make_mesh(settings.mesh, jax.devices()[:DEVICES])
    spec = resolve(settings.model, 64, TOKENS)
    optimizer = optimizer_for(spec, settings)
    return _Parts(settings, mesh, spec, optimizer, abstract_state(spec, optimizer, mesh, directed=True))


def _spec(leaf: Any) -> str:
    return ", ".join("-" if axis is None else str(axis) for axis in leaf.sharding.spec) or "whole"
