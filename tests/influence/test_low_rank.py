"""Directions of low rank: the factors against the SVD, utilities against explicit gradients, and what is saved."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import MeshConfig
from opus_jax.distributed.axes import sharding, tree_shardings
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.influence import directional, low_rank
from opus_jax.influence.audit import rank_agreement
from opus_jax.influence.per_example import per_example_gradients
from opus_jax.models import transformer
from opus_jax.models.loss import row_losses, token_losses
from opus_jax.models.presets import PRESETS

SPEC = replace(PRESETS["tiny"], layers=2, width=32, heads=2, kv_heads=1, head_dim=16, hidden=48, vocab_size=40)
LOSS = partial(row_losses, SPEC)


def rows(count, seed):
    draw = np.random.default_rng(seed)
    ones = np.ones((count, 12))
    return {
        "tokens": jnp.asarray(draw.integers(0, 40, ones.shape), jnp.int32),
        "segment_ids": jnp.asarray(ones, jnp.int32),
        "loss_mask": jnp.asarray(ones, jnp.float32),
    }


@cache
def problem():
    """(params, v, batch): v the gradient of other rows, whose singular values fall as those of a direction do."""
    params = transformer.init(SPEC, jax.random.key(0))
    v = jax.jit(jax.grad(lambda p: LOSS(p, rows(4, 1)).mean()))(params)
    return params, v, rows(16, 0)


@cache
def exact():
    return jax.jit(lambda args: directional.utilities(LOSS, *args))(problem())


def at_rank(rank, **options):
    return jax.jit(lambda args: low_rank.utilities(LOSS, *args, rank=rank, **options))(problem())


@pytest.mark.parametrize("shape", [(2, 20, 30), (30, 20)])
def test_factors_are_the_best_of_their_rank(shape):
    """Against the SVD in float64: the error is the best one's to a few percent, and none where the rank is whole."""
    draw = np.random.default_rng(0)
    flat = draw.normal(size=shape) * np.exp(-0.3 * np.arange(shape[-1]))
    matrix = 1e-12 * flat @ np.linalg.qr(draw.normal(size=(shape[-1], shape[-1])))[0]  # small, and in general position
    for rank in (1, 4, 20):
        left, right = low_rank.thin_factors(jnp.asarray(matrix, jnp.float32), rank)
        assert (left.shape[-1], right.shape[-2]) == (rank, rank)
        error = np.linalg.norm(np.asarray(left, np.float64) @ np.asarray(right, np.float64) - matrix, axis=(-2, -1))
        values = np.linalg.svd(matrix, compute_uv=False)
        best, size = np.sqrt((values[..., rank:] ** 2).sum(-1)), np.sqrt((values**2).sum(-1))
        assert (error <= 1.02 * best + 1e-5 * size).all()
    zero = low_rank.thin_factors(jnp.zeros(shape), 3)
    assert not any(np.asarray(x).any() and y for x, y in zip(zero, (False, True), strict=True)), "0 stays 0"
    assert all(np.isfinite(x).all() for x in zero)


def test_utilities_are_the_dot_products_with_the_truncated_direction():
    """By explicit gradients and NumPy's SVD; vectors and tables keep their direction."""
    params, v, batch = problem()
    gradients = jax.jit(lambda: per_example_gradients(LOSS, params, batch))()

    def truncated(path, x):
        x = np.asarray(x, np.float64)
        if path[-1].key != "kernel" or 3 * sum(x.shape[-2:]) >= np.prod(x.shape[-2:]):
            return x
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        return (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]

    low = jax.tree_util.tree_map_with_path(truncated, v)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(low), strict=True)
    expected = sum(np.asarray(g, np.float64).reshape(16, -1) @ x.ravel() for g, x in pairs)
    found = at_rank(3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(at_rank(3, chunk=4), found, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_whole_rank_is_exact_and_small_ranks_lose_agreement_gradually():
    np.testing.assert_allclose(at_rank(32), exact(), rtol=1e-4, atol=1e-5 * float(jnp.abs(exact()).max()))
    agreement = [float(rank_agreement(at_rank(rank), exact())) for rank in (1, 3, 12)]
    assert agreement == sorted(agreement)
    assert agreement[0] > 0.4
    assert agreement[-1] > 0.97


def test_tokens_add_up_to_rows():
    tokens = jax.jit(lambda args: low_rank.utilities(partial(token_losses, SPEC), *args, rank=3))(problem())
    np.testing.assert_allclose(tokens.sum(1) / 11, at_rank(3), rtol=1e-3, atol=1e-4)


def test_sharded_over_eight_devices_is_the_same():
    params, v, batch = problem()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = tree_shardings(mesh, transformer.logical_axes(SPEC), params)
    spread = {name: jax.device_put(x, sharding(mesh, ("batch", None), x.shape)) for name, x in batch.items()}
    with jax.set_mesh(mesh):
        score = jax.jit(lambda p, v, b: low_rank.utilities(LOSS, p, v, b, rank=3))
        sharded = score(jax.device_put(params, place), jax.device_put(v, place), spread)
    np.testing.assert_allclose(sharded, at_rank(3), rtol=2e-3, atol=1e-3 * float(jnp.abs(exact()).max()))


def test_a_loss_without_forward_rule_is_refused():
    @jax.custom_vjp
    def bent(x):
        return x

    bent.defvjp(lambda x: (x, None), lambda _, g: (g,))
    with pytest.raises(UserError, match=r"set selection.rank=null selection.derivative=difference"):
        low_rank.utilities(lambda p, b: bent(LOSS(p, b)), *problem(), rank=3)
