import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import opus_jax as oj
from opus_jax.config import MeshConfig
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.influence.sketch import CountSketch, KronSketch, TensorSketch, make_sketch, sketch, sketch_tree
from pallas_kernels.count_sketch.hashing import fold_seed
from tests.influence.sketch.sketched import drawn

SEED = jnp.uint32(5)


def gradients(seed=0, rows=3):
    """Leaves in the tree's order: 2 stacked vectors, 2 stacked matrices, a single one, a vector: 6 layer matrices."""
    shapes = {"gain": (2, 9), "kernel": (2, 5, 8)}
    tree = {"blocks": shapes, "head": (6, 9), "last": (7,)}
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    draws = [jnp.asarray(drawn(seed + n, rows, *shape), jnp.float32) for n, shape in enumerate(leaves)]
    return jax.tree.unflatten(structure, draws)


@pytest.mark.parametrize("family", [CountSketch(16), KronSketch(2, 2), TensorSketch(16)])
def test_every_layer_matrix_is_sketched_under_a_seed_of_its_own(family):
    tree = gradients()
    found = jax.jit(lambda tree: sketch_tree(family, tree, SEED))(tree)
    assert found.shape == (3, 6, family.width)
    gain, kernel = tree["blocks"]["gain"], tree["blocks"]["kernel"]
    matrices = [(0, 0, gain[:, 0, None]), (0, 1, gain[:, 1, None]), (1, 0, kernel[:, 0]), (1, 1, kernel[:, 1])]
    matrices += [(2, 0, tree["head"]), (3, 0, tree["last"][:, None])]
    of_gradient = jax.jit(family.of_gradient)
    for place, (leaf, layer, matrix) in enumerate(matrices):
        expected = of_gradient(matrix, fold_seed(SEED, leaf, layer))
        np.testing.assert_allclose(found[:, place], expected, rtol=1e-4, atol=1e-5)


def test_axes_between_rows_and_matrix_count_layers():
    stacked = jnp.asarray(drawn(0, 2, 3, 4, 5, 6), jnp.float32)
    assert sketch_tree(CountSketch(8), [stacked], SEED).shape == (2, 12, 8)


def test_equal_layers_have_signs_of_their_own():
    found = sketch_tree(CountSketch(4000), {"stack": jnp.ones((1, 2, 50, 80))}, SEED)[0]
    assert abs(float(jnp.mean(found[0] * found[1]))) < 0.1


@pytest.mark.parametrize("method", ["count", "kron", "tensor"])
def test_is_offered_to_everyone(method):
    tree = {"w": jnp.asarray(drawn(0, 2, 60, 70), jnp.float32)}
    found = oj.sketch(tree, method=method, m=2048, seed=1)
    assert oj.sketch is sketch
    assert found.shape == (2, 1, 2048)
    np.testing.assert_allclose(found, sketch_tree(make_sketch(method, 2048), tree, jnp.uint32(1)))
    exact = np.linalg.norm(tree["w"][0])
    assert float(jnp.linalg.norm(found[0])) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "srht"}, "'srht': must be one of count, kron, tensor"),
        ({"m": 0}, "m = 0: must be at least 1"),
        ({"method": "tensor", "m": 0}, "m = 0: must be at least 1"),
        ({"method": "kron", "m": 1000}, "multiple of 1024"),
        ({"method": "kron", "m": 0}, "multiple of 1024"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        oj.sketch({"w": jnp.zeros((2, 3, 4))}, **settings)


@pytest.mark.parametrize("family", [CountSketch(32), CountSketch(32, "hash"), KronSketch(2, 4), TensorSketch(32)])
def test_tables_are_no_larger_than_a_few_layers_of_many(family):
    """What exists besides gradients and sketches is one layer's: a few percent of the weights, by the compiler."""
    layers, side = 64, 128
    tree = {"blocks": {"kernel": jax.ShapeDtypeStruct((1, layers, side, side), jnp.float32)}}
    compiled = jax.jit(lambda tree, seed: sketch_tree(family, tree, seed)).lower(tree, SEED).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.07 * layers * side * side * 4


def test_matrices_that_a_mesh_splits_are_sketched_where_they_lie():
    """The same numbers as on one device, and no device is sent the rest of a matrix."""
    tree = {"blocks": {"kernel": jnp.asarray(drawn(0, 8, 2, 12, 40), jnp.float32)}}
    whole = jax.jit(lambda tree: sketch_tree(CountSketch(24), tree, SEED))(tree)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, None, "tensor"))
    split = jax.device_put(tree, place)
    axes = (("blocks.kernel", (None, "tensor")),)
    with jax.set_mesh(mesh):
        programs = {a: jax.jit(lambda tree, a=a: sketch_tree(CountSketch(24), tree, SEED, axes=a)) for a in (axes, ())}
        texts = {a: program.lower(split).compile().as_text() for a, program in programs.items()}
        found = programs[axes](split)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    assert "all-gather" not in texts[axes]
    assert "all-gather" in texts[()], "otherwise this would show nothing"
