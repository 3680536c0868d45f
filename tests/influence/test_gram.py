from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opus_jax.config import MeshConfig, SelectionConfig
from opus_jax.distributed.axes import sharding
from opus_jax.distributed.hlo import collectives
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.influence.gram import alignment_and_gram, gram_of_sketches
from opus_jax.influence.per_example import per_example_gradients
from opus_jax.optim.matrix_preconditioner import Diagonal, OutputSide, apply_tree, identities
from opus_jax.optim.preconditioner import direction
from opus_jax.selection import paper
from opus_jax.training.inner_products import InnerProducts


def mixing(params):
    """A linear P that is neither diagonal nor symmetric."""
    turn = jnp.asarray(np.random.default_rng(5).normal(size=(7, 7)), jnp.float32)
    return lambda g: {"layers": [2 * g["layers"][0] @ turn, -g["layers"][1]], "bias": turn @ g["bias"]}


def dense(tree):
    """[N, ...] leaves as one float64 matrix [N, parameters]."""
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(tree)], axis=1)


def dense_oracle(case, precondition, both_sides):
    loss, params, proxy, batch = case
    rows = per_example_gradients(loss, params, batch)
    displaced = [precondition(jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(16)]
    g, pg = dense(rows), np.concatenate([dense(add_row(one)) for one in displaced])
    return pg @ dense(add_row(proxy))[0], pg @ (pg if both_sides else g).T


def add_row(tree):
    return jax.tree.map(lambda x: x[None], tree)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_is_the_dense_algebra(mlp, both_sides, chunk):
    loss, params, proxy, batch = mlp
    expected = dense_oracle(mlp, mixing(params), both_sides)
    found = jax.jit(
        lambda: alignment_and_gram(loss, params, batch, proxy, mixing(params), chunk=chunk, both_sides=both_sides)
    )()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def preconditioners():
    """A P of every leaf that sketches know, as mixed as they come."""
    draw = np.random.default_rng(5)
    turn, scale = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((7, 7), (7,)))
    return {"layers": [OutputSide(2 * turn), Diagonal(-jnp.ones((7, 3)))], "bias": Diagonal(scale)}


def by_leaf(gradient):
    return apply_tree(preconditioners(), gradient)


def sketched(case, p, m, chunk=None, seed=0):
    """The trainer's way, with every gradient formed and sketches m wide."""
    loss, params, proxy, batch = case
    settings = SelectionConfig(method="paper", engine="per_example", score_chunk=chunk)
    asked = InnerProducts(settings, loss, params, batch, jnp.asarray(seed, jnp.uint32), frozen=lambda: p)
    with patch.object(paper, "SKETCH", m):
        found = asked.paper(proxy)
    return found.utilities, found.gram


def test_wide_sketches_lose_nothing(mlp):
    """No matrix has more than 35 entries, so every entry has its own place."""
    alignment, gram = dense_oracle(mlp, by_leaf, both_sides=True)
    found = sketched(mlp, preconditioners(), m=64)
    np.testing.assert_allclose(found[0], alignment, rtol=1e-4, atol=1e-4 * np.abs(alignment).max())
    np.testing.assert_allclose(found[1], gram, rtol=1e-4, atol=1e-4 * np.abs(gram).max())


def test_narrow_sketches_are_right_on_average(mlp):
    alignment, gram = dense_oracle(mlp, by_leaf, both_sides=True)
    draws = jax.jit(jax.vmap(lambda seed: sketched(mlp, preconditioners(), m=8, seed=seed)))(jnp.arange(400))
    for found, exact in zip(draws, (alignment, gram), strict=True):
        error = np.asarray(found, np.float64) - exact
        spread = error.std(axis=0) / 20
        assert error.std() > 0.01 * np.abs(exact).max()
        assert np.all(np.abs(error.mean(axis=0)) < 5 * spread + 1e-5 * np.abs(exact).max())


def test_chunks_change_no_sketch(mlp):
    whole, parts = (sketched(mlp, preconditioners(), m=8, chunk=chunk) for chunk in (None, 4))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def test_a_sketch_holds_one_chunk_of_gradients(mlp):
    """The compiler's own count of temporary memory, with parameters that dwarf the sketches."""
    params = {"w": jnp.zeros((128, 128))}
    loss = lambda p, x: jnp.tanh(x @ p["w"]).sum(1)  # noqa: E731
    rows = jnp.zeros((32, 128))

    def temporary(function):
        return jax.jit(function).lower(params, rows).compile().memory_analysis().temp_size_in_bytes

    same = lambda g: g  # noqa: E731
    of_batch = lambda p, batch: loss(p, batch["x"])  # noqa: E731
    narrow = temporary(lambda p, x: sketched((of_batch, p, p, {"x": x}), identities(p), m=64, chunk=2))
    everything = temporary(lambda p, x: alignment_and_gram(loss, p, x, p, same))
    assert narrow < everything / 4


def test_the_metric_of_the_optimizer_makes_a_symmetric_gram(mlp):
    """With P the derivative of a real AdamW update, as redundancy uses it."""
    loss, params, proxy, batch = mlp
    adam = optax.adamw(1e-2)
    state = jax.jit(adam.update)(proxy, adam.init(params), params)[1]
    pull = jax.jit(lambda g: direction(adam, state, params, proxy, g))
    alignment, gram = alignment_and_gram(loss, params, batch, proxy, pull)
    np.testing.assert_allclose(gram, gram.T, rtol=1e-3, atol=1e-5 * float(jnp.abs(gram).max()))
    expected = dense_oracle(mlp, pull, both_sides=False)
    np.testing.assert_allclose(alignment, expected[0], rtol=1e-3, atol=1e-4 * np.abs(expected[0]).max())


def test_sharded_rows_give_the_same(mlp):
    loss, params, proxy, batch = mlp
    mesh = make_mesh(MeshConfig(data=8))
    score = jax.jit(lambda rows: alignment_and_gram(loss, params, rows, proxy, mixing(params), chunk=8))
    expected = score(batch)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, sharding(mesh, ("batch", None), x.shape)) for name, x in batch.items()}
        found = score(placed)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_chunk_must_divide(mlp):
    with pytest.raises(UserError, match="does not divide"):
        sketched(mlp, lambda g: g, m=8, chunk=3)


def test_the_gram_matrix_of_sketches_is_summed_in_shares():
    """No device is sent all sketches: its share of everyone's numbers, and the sums of the others."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    sketches = jax.random.normal(jax.random.key(0), (16, 3, 64))
    split = jax.device_put(sketches, sharding(mesh, ("batch", None, None), sketches.shape))
    with jax.set_mesh(mesh):
        compiled = jax.jit(gram_of_sketches).lower(split).compile()
    flat = np.asarray(sketches).reshape(16, -1)
    np.testing.assert_allclose(compiled(split), flat @ flat.T, rtol=1e-4, atol=1e-4)
    found = {x.kind: x.moved for x in collectives(compiled.as_text(), mesh)}
    assert found == {"all-to-all": 2 * 3 * 64 * 4, "all-reduce": 16 * 16 * 4}
