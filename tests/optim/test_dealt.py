"""Muon on a mesh: the same update and the same derivative, from matrices that are moved once and then whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import MeshConfig, OptimizerConfig
from opus_jax.distributed.axes import tree_shardings
from opus_jax.distributed.hlo import collectives
from opus_jax.distributed.mesh import make_mesh
from opus_jax.optim.dealt import on_whole_matrices
from opus_jax.optim.optimizers import make_optimizer, opt_state_logical_axes
from opus_jax.optim.preconditioner import direction

AXES = {
    "blocks": {"up": {"kernel": ("layer", "embed", "mlp")}, "down": {"kernel": ("layer", "mlp", "embed")}},
    "embedding": ("vocab", "embed"),
}


def parameters(layers: int) -> dict[str, Any]:
    up = jax.random.normal(jax.random.key(1), (layers, 16, 32))
    down = jax.random.normal(jax.random.key(2), (layers, 32, 16))
    return {
        "blocks": {"up": {"kernel": up}, "down": {"kernel": down}},
        "embedding": jax.random.normal(jax.random.key(3), (64, 16)),
    }


MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, 4, id="as many layers as devices"),
    pytest.param({"fsdp": 8}, 3, id="fewer layers than devices", marks=pytest.mark.slow),
    pytest.param({"data": 2, "tensor": 4}, 6, id="layers that do not divide"),
]


def on_mesh(shape: dict[str, int], layers: int):
    """(function jitted on the mesh, its arguments there, the function's result on one device, the mesh)."""
    params = parameters(layers)
    optimizer = make_optimizer(OptimizerConfig(name="muon", clip=None), 10, params, AXES)
    gradient, proxy = (jax.tree.map(lambda p, w=w: jnp.sin(w * p), params) for w in (3.0, 5.0))
    _, state = optimizer.transform.update(jax.tree.map(jnp.cos, params), optimizer.transform.init(params), params)

    def both(gradient, proxy, params, state):
        update, _ = optimizer.transform.update(gradient, state, params)
        return update, direction(optimizer, state, params, gradient, proxy)

    mesh = make_mesh(MeshConfig(**shape))
    place = lambda tree, axes: jax.device_put(tree, tree_shardings(mesh, axes, tree))  # noqa: E731
    state_axes = opt_state_logical_axes(optimizer, params, AXES)
    arguments = (*(place(tree, AXES) for tree in (gradient, proxy, params)), place(state, state_axes))
    results = tree_shardings(mesh, AXES, params)
    jitted = jax.jit(both, out_shardings=(results, results))
    return jitted, arguments, jax.jit(both)(gradient, proxy, params, state), mesh


@pytest.mark.parametrize(("shape", "layers"), MESHES)
def test_muon_on_a_mesh_is_muon(shape, layers):
    jitted, arguments, expected, mesh = on_mesh(shape, layers)
    with jax.set_mesh(mesh):
        compiled = jitted.lower(*arguments).compile()
    found = compiled(*arguments)
    for kind in range(2):  # the update, the direction
        for a, b in zip(jax.tree.leaves(found[kind]), jax.tree.leaves(expected[kind]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * float(jnp.abs(b).max()))
    _moves_every_matrix_there_and_back(compiled.as_text(), mesh, layers)


def _moves_every_matrix_there_and_back(program, mesh, layers):
    """Two matrices: update, reference and its way back; one exchange for each mesh axis on every way."""
    found = collectives(program, mesh)
    large = [c for c in found if c.bytes > 64]  # norms and floors are sums of scalars
    axes = sum(mesh.shape[axis] > 1 for axis in ("fsdp", "tensor"))
    assert sum(c.count for c in large) <= 2 * 6 * axes, found
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    share = -(-layers // ways) * 16 * 32 * 4
    assert all(c.kind == "all-to-all" and c.bytes <= share for c in large), found


def test_layers_that_are_added_are_harmless_and_gone():
    stack = jnp.arange(24.0).reshape(3, 2, 4)
    seen = []

    def function(matrices):
        seen.append(matrices.shape)
        return 1 / matrices

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        found = jax.jit(lambda x: on_whole_matrices(function, x, ("layer", "embed", "mlp")))(stack + 1)
    np.testing.assert_allclose(found, 1 / (stack + 1), rtol=1e-6)
    assert seen == [(8, 2, 4)]
    on_whole_matrices(function, stack, ("layer", "embed", "mlp"))
    assert seen[1] == (3, 2, 4)
