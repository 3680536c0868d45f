"""The network against a slow reference, and everything that must leave its logits and gradients as they are."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_model import SPECS, perturbed_parameters, quick_jit, reference_logits

from opus_jax.config import MeshConfig
from opus_jax.distributed.axes import sharding, tree_shardings
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.models import transformer
from opus_jax.models.loss import batch_loss

ROWS, LENGTH = 3, 16
SEGMENTS = np.array([[1] * 5 + [2] * 7 + [0] * 4, [1] * 16, [1] + [2] * 2 + [3] * 12 + [0]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 32, (ROWS, LENGTH)).astype(np.int32)

all_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@cache
def logits_of(spec):
    return quick_jit(lambda params, tokens: transformer.apply(spec, params, tokens, jnp.asarray(SEGMENTS)))


def double_logits(spec, params, tokens):
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        return np.asarray(logits_of(replace(spec, dtype="float64"))(double, jnp.asarray(tokens)))


def sum_of_nats(spec, params, rows):
    return batch_loss(spec, params, rows)[0]


@cache
def unsharded(spec):
    return quick_jit(jax.value_and_grad(partial(sum_of_nats, spec)))


def tangent_like(params):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), params)


def batch(tokens=TOKENS, segments=SEGMENTS):
    targets = (segments[:, 1:] != 0) & (segments[:, 1:] == segments[:, :-1])
    mask = np.pad(targets, ((0, 0), (1, 0))).astype(np.float32)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments), "loss_mask": jnp.asarray(mask)}


@all_specs
def test_packed_segments_equal_the_reference_on_each_document_alone(spec):
    """Scan, mask, positions, grouped queries, norms and activations at once, in float64."""
    params = perturbed_parameters(spec)
    logits = double_logits(spec, params, TOKENS)
    assert np.isfinite(logits).all()
    for row in range(ROWS):
        for segment in range(1, SEGMENTS[row].max() + 1):
            inside = SEGMENTS[row] == segment
            expected = reference_logits(spec, params, TOKENS[row, inside])
            np.testing.assert_allclose(logits[row, inside], expected, rtol=1e-9, atol=1e-9)


@all_specs
def test_padding_and_the_future_change_no_logits(spec):
    params = perturbed_parameters(spec)
    other = np.where(SEGMENTS == 0, (TOKENS + 5) % 32, TOKENS)
    other[1, 9:] = (other[1, 9:] + 3) % 32
    plain, changed = double_logits(spec, params, TOKENS), double_logits(spec, params, other)
    kept = SEGMENTS != 0
    kept[1, 9:] = False
    np.testing.assert_array_equal(plain[kept], changed[kept])
    assert np.abs(plain[1, 9:] - changed[1, 9:]).max() > 1e-3


@all_specs
def test_forward_mode_gives_the_slope_of_the_reference(spec):
    """Through scan and remat, against central differences of the float64 reference loss."""
    params, tangent = perturbed_parameters(spec), tangent_like(perturbed_parameters(spec))
    loss = lambda p: batch_loss(replace(spec, remat="full"), p, batch(TOKENS[:1, :8], SEGMENTS[1:2, :8]))[0]  # noqa: E731
    value, slope = quick_jit(lambda p, t: jax.jvp(loss, (p,), (t,)))(params, tangent)

    def reference(step):
        moved = jax.tree.map(lambda p, t: np.float64(p) + step * np.float64(t), params, tangent)
        logits = reference_logits(spec, moved, TOKENS[0, :8])[:-1]
        return (np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), TOKENS[0, 1:8]]).sum()

    np.testing.assert_allclose(value, reference(0.0), rtol=1e-5)
    np.testing.assert_allclose(slope, (reference(1e-5) - reference(-1e-5)) / 2e-5, rtol=1e-3, atol=1e-3)


def test_remat_changes_neither_loss_nor_gradients_and_both_modes_agree():
    spec = SPECS["simplenorm"]
    params = perturbed_parameters(spec)
    tangent = tangent_like(params)

    def loss(remat, p):
        return batch_loss(replace(spec, remat=remat), p, batch())[0]

    plain = quick_jit(jax.value_and_grad(partial(loss, "none")))(params)
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(tangent), strict=True))
    forward = quick_jit(lambda p, t: jax.jvp(partial(loss, "dots"), (p,), (t,))[1])(params, tangent)
    np.testing.assert_allclose(forward, slope, rtol=2e-4)
    for remat in ("full", "dots"):
        again = quick_jit(jax.value_and_grad(partial(loss, remat)))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, plain)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("simplenorm", MeshConfig(data=8)),
        ("simplenorm", MeshConfig(fsdp=4, tensor=2)),
        ("query and key norm", MeshConfig(replica=2, data=1, fsdp=2, tensor=2)),
    ],
)
def test_a_sharded_model_has_the_same_loss_and_gradients(name, mesh):
    spec, mesh = SPECS[name], make_mesh(mesh)
    params, rows = perturbed_parameters(spec), batch(np.tile(TOKENS, (3, 1))[:8], np.tile(SEGMENTS, (3, 1))[:8])
    shardings = tree_shardings(mesh, transformer.logical_axes(spec), params)
    split = jax.device_put(params, shardings)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        kernel = split["blocks"]["mlp"]["up"]["kernel"]
        ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
        assert kernel.addressable_shards[0].data.size * ways == kernel.size
    step = jax.value_and_grad(partial(sum_of_nats, spec))
    expected = unsharded(spec)(params, rows)
    with jax.set_mesh(mesh):
        placed = jax.device_put(rows, sharding(mesh, ("batch", None)))
        actual = quick_jit(step, out_shardings=(None, shardings))(split, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), actual, expected)


def test_bfloat16_computes_close_to_float32_and_keeps_float32_outside():
    for name in ("simplenorm", "GPT-2"):
        spec, params = SPECS[name], perturbed_parameters(SPECS[name])
        exact = logits_of(spec)(params, TOKENS)
        short = logits_of(replace(spec, dtype="bfloat16"))(params, TOKENS)
        assert short.dtype == jnp.float32
        assert 0 < np.abs(short - exact).mean() < 0.03 * np.abs(exact).mean()
        assert np.abs(short - exact).max() < 0.25 * np.abs(exact).max()


def test_init_gives_float32_arrays_that_logical_axes_describe():
    for spec in SPECS.values():
        params = jax.eval_shape(lambda spec=spec: transformer.init(spec, jax.random.key(0)))
        axes = transformer.logical_axes(spec)
        jax.tree.map(lambda x, names: None if x.ndim == len(names) else pytest.fail(f"{x} {names}"), params, axes)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        assert all(names[0] == "layer" for names in jax.tree.leaves(axes["blocks"], is_leaf=lambda x: type(x) is tuple))
        assert transformer.parameter_count(spec) == sum(x.size for x in jax.tree.leaves(params))


def test_gains_have_the_width_of_what_they_scale():
    def gains(name):
        attention = jax.eval_shape(lambda: transformer.init(SPECS[name], jax.random.key(0)))["blocks"]["attention"]
        return {part: x["gain"].shape for part, x in attention.items() if "gain" in x}

    assert gains("simplenorm") == {"query": (2, 16), "key": (2, 8), "value": (2, 8), "output": (2, 16)}
    assert gains("simplenorm, per head") == {"query": (2, 24), "key": (2, 12), "value": (2, 12), "output": (2, 16)}
    assert gains("query and key norm") == {"query_norm": (2, 16), "key_norm": (2, 8)}
    assert gains("Qwen3") == {"query_norm": (2, 6), "key_norm": (2, 6)}


def test_simplenorm_blocks_have_no_norm_in_front():
    params = jax.eval_shape(lambda: transformer.init(SPECS["simplenorm"], jax.random.key(0)))
    assert set(params["blocks"]) == {"attention", "mlp"}
    assert set(params) == {"embedding", "blocks", "final_norm", "head"}


def test_initial_scales_follow_the_setting():
    base = replace(SPECS["Llama"], width=256, hidden=512, vocab_size=64, layers=3)
    build = quick_jit(transformer.init, static_argnums=0)
    for setting, read, write in (
        ("fan_in", 256**-0.5, [(6 * 512) ** -0.5] * 3),
        ("official", 0.02, [0.02 * (2 * (layer + 1)) ** -0.5 for layer in range(3)]),
    ):
        params = jax.tree.map(np.asarray, build(replace(base, init=setting), jax.random.key(0)))
        mlp = params["blocks"]["mlp"]
        np.testing.assert_allclose(np.std(mlp["gate"]["kernel"]), read, rtol=0.02)
        np.testing.assert_allclose(np.std(mlp["down"]["kernel"], axis=(1, 2)), write, rtol=0.02)
        np.testing.assert_allclose(np.std(params["embedding"]["embedding"]), 1, rtol=0.05)
        np.testing.assert_allclose(np.std(params["head"]["kernel"]), 256**-0.5, rtol=0.05)
        kernels = [x for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3]
        assert all(np.abs(layer).max() > 0 for x in kernels for layer in x)
        assert not np.allclose(mlp["up"]["kernel"][0], mlp["up"]["kernel"][1])


def test_a_tied_simplenorm_model_starts_with_unit_embeddings():
    spec = replace(SPECS["simplenorm, LayerNorm, learned positions, tied, GELU"], width=64, vocab_size=512)
    table = quick_jit(transformer.init, static_argnums=0)(spec, jax.random.key(0))["embedding"]["embedding"]
    np.testing.assert_allclose(np.std(np.asarray(table)) * spec.embedding_scale, 1, rtol=0.02)
    assert replace(spec, norm="prenorm").embedding_scale == replace(spec, tied=False).embedding_scale == 1


def test_given_positions_are_used():
    spec = SPECS["GPT-2"]
    params = perturbed_parameters(spec)
    shifted = np.broadcast_to(np.arange(LENGTH)[::-1], (ROWS, LENGTH))
    given = quick_jit(partial(transformer.apply, spec))(params, TOKENS, SEGMENTS, positions=shifted)
    assert np.abs(given - logits_of(spec)(params, TOKENS)).max() > 1e-2


def test_rows_longer_than_the_position_table_are_refused():
    spec = replace(SPECS["GPT-2"], max_length=8)
    with pytest.raises(UserError, match=r"16 tokens.*max_length = 8"):
        jax.eval_shape(
            lambda: transformer.apply(
                spec, transformer.init(spec, jax.random.key(0)), jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)
            )
        )
