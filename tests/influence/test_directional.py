import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import opus_jax as oj
from opus_jax.config import MeshConfig
from opus_jax.distributed.axes import sharding, tree_shardings
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import UserError
from opus_jax.influence import per_example
from opus_jax.influence.directional import document_utilities, token_utilities, utilities
from opus_jax.models import transformer


def test_jvp_is_the_explicit_dot_product_on_any_pytree(mlp):
    loss, params, v, batch = mlp
    rows = oj.per_example_gradients(loss, params, batch)
    pairs = zip(jax.tree.leaves(rows), jax.tree.leaves(v), strict=True)
    expected = sum(np.asarray(g, np.float64).reshape(16, -1) @ np.asarray(x, np.float64).ravel() for g, x in pairs)
    np.testing.assert_allclose(utilities(loss, params, v, batch), expected, rtol=1e-4, atol=1e-5)


def test_jvp_is_the_explicit_dot_product_on_the_transformer(language_model):
    _, loss, _, params, v, batch = language_model
    exact = jax.jit(lambda: per_example.utilities(loss, params, v, batch, chunk=4))()
    scores = jax.jit(lambda: utilities(loss, params, v, batch))()
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, exact, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(exact))))


def test_exact_on_linear_regression_with_the_real_update():
    """A quadratic proxy loss and SGD: central differences of the true loss are exact, so utilities must be too."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x, y, w = (jnp.asarray(draw.normal(size=s)) for s in ((12, 4), (12,), (4,)))
        px, py = jnp.asarray(draw.normal(size=(20, 4))), jnp.asarray(draw.normal(size=20))
        loss = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2  # noqa: E731
        proxy = lambda w: jnp.mean(loss(w, (px, py)))  # noqa: E731
        sgd = optax.sgd(0.1)
        state = sgd.init(w)

        def fall(i, weight):  # of the proxy loss when example i joins the batch with this weight
            gradient = weight * jax.grad(lambda w: loss(w, (x[i : i + 1], y[i : i + 1]))[0])(w)
            return proxy(w) - proxy(optax.apply_updates(w, sgd.update(gradient, state, w)[0]))

        v = oj.direction(sgd, state, w, jnp.ones(4), jax.grad(proxy)(w))
        scores = utilities(loss, w, v, (x, y))
        assert scores.dtype == jnp.float64
        truth = [(fall(i, 1.0) - fall(i, -1.0)) / 2 for i in range(12)]
        np.testing.assert_allclose(scores, truth, rtol=1e-9)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_change_nothing(mlp, chunk):
    loss, params, v, batch = mlp
    np.testing.assert_allclose(
        utilities(loss, params, v, batch, chunk=chunk), utilities(loss, params, v, batch), rtol=1e-5, atol=1e-5
    )


def test_permuting_candidates_permutes_utilities_and_the_pick(mlp):
    loss, params, v, batch = mlp
    order = np.random.default_rng(0).permutation(16)
    scores = utilities(loss, params, v, batch)
    permuted = utilities(loss, params, v, jax.tree.map(lambda x: x[order], batch))
    np.testing.assert_allclose(permuted, scores[order], rtol=1e-5, atol=1e-5)
    pick, _ = oj.select(scores, 4, temperature=0.0, key=jax.random.key(0))
    permuted_pick, _ = oj.select(permuted, 4, temperature=0.0, key=jax.random.key(0))
    assert set(order[permuted_pick]) == set(np.asarray(pick))


def test_tokens_add_up_to_segments_and_segments_to_rows(language_model):
    _, loss, token_loss, params, v, batch = language_model
    tokens = jax.jit(lambda: token_utilities(token_loss, params, v, batch))()
    assert tokens.shape == (8, 12)
    assert np.all(np.asarray(tokens)[np.asarray(batch["loss_mask"]) == 0] == 0)
    segments = jax.jit(lambda: document_utilities(token_loss, params, v, batch, segments=3, chunk=4))()
    np.testing.assert_allclose(segments[:, 0], tokens[:, :5].sum(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(segments[:, 1], tokens[:, 5:10].sum(1), rtol=1e-4, atol=1e-4)
    assert np.all(segments[:, 2] == 0)
    rows = jax.jit(lambda: utilities(loss, params, v, batch))()
    np.testing.assert_allclose(segments.sum(1) / batch["loss_mask"].sum(1), rows, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 4])
def test_sharded_over_eight_devices_is_the_same(language_model, chunk):
    spec, loss, _, params, v, batch = language_model
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    score = lambda p, v, b: utilities(loss, p, v, b, chunk=chunk)  # noqa: E731
    place = tree_shardings(mesh, transformer.logical_axes(spec), params)
    rows = {name: jax.device_put(x, sharding(mesh, ("batch", None), x.shape)) for name, x in batch.items()}
    with jax.set_mesh(mesh):
        sharded = jax.jit(score)(jax.device_put(params, place), jax.device_put(v, place), rows)
    np.testing.assert_allclose(sharded, jax.jit(score)(params, v, batch), rtol=1e-4, atol=1e-4)


def test_bfloat16_losses_give_float32_utilities(mlp):
    loss, params, v, batch = mlp
    narrow = lambda p, b: loss(p, b).astype(jnp.bfloat16)  # noqa: E731
    assert utilities(narrow, params, v, batch).dtype == jnp.float32


def test_mistakes_are_named(mlp):
    loss, params, v, batch = mlp
    with pytest.raises(ValueError, match="must be one of jvp, difference"):
        utilities(loss, params, v, batch, method="forward")
    with pytest.raises(UserError, match="chunk = 5 does not divide the 16 rows"):
        utilities(loss, params, v, batch, chunk=5)
    with pytest.raises(UserError, match="not a tree like the parameters"):
        utilities(loss, params, {"layers": v["layers"]}, batch)
