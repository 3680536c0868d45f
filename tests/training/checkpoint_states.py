"""States that tests and their child processes save: every kind of leaf a training state has."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = {
    "domain_weights": np.array([0.3, 0.7], np.float64),
    "drawn": np.array([1, 2**40], np.int64),
    "priorities": np.zeros((0,), np.float32),
}
META = {"totals": {"loss_digest": "ab", "flops": 2**70, "target": None}, "share": 0.1}


def make_mesh(*shape: int, names: str = "ab") -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, tuple(names[: len(shape)]), axis_types=(AxisType.Auto,) * len(shape))


def make_state(seed: int, mesh: Mesh) -> dict[str, Any]:
    """Muon on matrices, AdamW on the rest, clipping; a typed key, an int scalar, a bfloat16 leaf."""
    return _state_maker(mesh)(seed)


@functools.cache
def _state_maker(mesh: Mesh) -> Callable[[int], dict[str, Any]]:
    def build(seed: jax.Array) -> dict[str, Any]:
        key = jax.random.key(seed)
        params = {
            "blocks": {"w": jax.random.normal(key, (2, 8, 16)), "gain": jnp.full((2, 8), 1 / 3, jnp.bfloat16)},
            "embed": jax.random.normal(key, (16, 8)) / 3,
        }
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(1e-2))
        _, opt_state = optimizer.update(jax.tree.map(lambda p: p * p, params), optimizer.init(params), params)
        return {
            "step": jnp.asarray(seed, jnp.int32),
            "params": params,
            "opt_state": opt_state,
            "none": None,
            "key": key,
        }

    shapes = jax.eval_shape(build, 0)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, _spec(x, mesh)), shapes)
    return jax.jit(build, out_shardings=shardings)


def make_small_state(mesh: Mesh) -> dict[str, Any]:
    """Quick to build: for processes that are started only to be killed."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    leaves = {"step": np.int32(0), "params": {"w": np.ones((64, 64), np.float32)}, "key": jax.random.key(7)}
    return jax.tree.map(lambda x: jax.device_put(x, everywhere), leaves)


def abstract(state: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, _spec(x, mesh))), state
    )


def state_hash(state: Any) -> str:
    """Over every bit of every leaf, and the structure."""
    digest = hashlib.sha256(str(jax.tree.structure(state)).encode())
    for leaf in jax.tree.leaves(state):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if key else leaf)
        digest.update(f"{leaf.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _spec(leaf: Any, mesh: Mesh) -> PartitionSpec:
    if leaf.ndim == 0 or leaf.shape[-1] % mesh.shape[mesh.axis_names[0]]:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (leaf.ndim - 1), mesh.axis_names[0])
