"""P of every matrix, against the frozen product of whole gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opus_jax.config import OptimizerConfig
from opus_jax.errors import UserError
from opus_jax.optim.frozen import frozen_product
from opus_jax.optim.matrix_preconditioner import (
    Diagonal,
    Factored,
    Identity,
    OutputSide,
    matrix_preconditioners,
    roots,
)
from opus_jax.optim.optimizers import make_optimizer

ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="linear", clip=None)
CONFIGS = {"adamw": ADAMW, "muon": dataclasses.replace(ADAMW, name="muon", adam_learning_rate=5e-3)}
KINDS = (Identity, Diagonal, Factored, OutputSide)


@pytest.fixture(params=CONFIGS)
def trained(request, params, random_like):
    """(optimizer, its state after three steps, parameters, a gradient)."""
    optimizer = make_optimizer(CONFIGS[request.param], 10, params)
    state, update = optimizer.transform.init(params), jax.jit(optimizer.transform.update)
    for seed in range(3):
        _, state = update(random_like(seed + 1, params), state, params)
    return optimizer, state, params, random_like(8, params)


def found(trained, form):
    optimizer, state, params, _ = trained
    return jax.jit(lambda state, params: matrix_preconditioners(optimizer, state, params, form))(state, params)


def flat(tree):
    """Preconditioners and Nones by their paths."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or isinstance(x, KINDS))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}


def test_exact_is_the_frozen_product(trained):
    optimizer, state, params, gradient = trained
    product = flat(frozen_product(optimizer, state, params, gradient))
    gradients, preconditioners = flat(gradient), flat(found(trained, "exact"))
    for name, p in preconditioners.items():
        np.testing.assert_allclose(p.apply(gradients[name]), product[name], rtol=1e-5, atol=1e-9)
    stacked = preconditioners["blocks/mlp/kernel"]
    assert isinstance(stacked, OutputSide if optimizer.config.name == "muon" else Diagonal)
    assert isinstance(preconditioners["head/kernel"], Diagonal)


def test_stacked_preconditioners_come_apart_layer_by_layer(trained):
    gradient = trained[3]["blocks"]["mlp"]["kernel"]
    for form in ("exact", "factored"):
        stacked = found(trained, form)["blocks"]["mlp"]["kernel"]
        _, by_layer = jax.lax.scan(lambda _, x: (None, x[0].apply(x[1])), None, (stacked, gradient))
        np.testing.assert_allclose(by_layer, stacked.apply(gradient), rtol=1e-5, atol=1e-9)


def test_factored_keeps_muons_side_and_makes_adams_rank_one(trained):
    exact, factored = flat(found(trained, "exact")), flat(found(trained, "factored"))
    for name, p in factored.items():
        if isinstance(p, Factored):
            scale = np.asarray(exact[name].scale, np.float64)
            square = scale**-2
            rows, columns = square.mean(-1, keepdims=True), square.mean(-2, keepdims=True)
            fit = np.sqrt(rows.mean(-2, keepdims=True) / (rows * columns))
            np.testing.assert_allclose(p.apply(jnp.ones(scale.shape)), fit, rtol=1e-4)
        else:  # Muon's, or a vector's
            assert name.endswith(("kernel", "embedding")) == isinstance(p, OutputSide), name
            jax.tree.map(np.testing.assert_array_equal, p, exact[name])


def test_rank_one_second_moments_are_fitted_exactly(params):
    """Of one gradient u v^T alone the second moments are of rank 1, but for the floor under them."""
    optimizer = make_optimizer(ADAMW, 10, params)
    gradient = jax.tree.map(jnp.ones_like, params)
    u, v = 1 + jnp.arange(6.0), 1 + jnp.arange(10.0)
    gradient["head"]["kernel"] = u[:, None] * v
    _, state = optimizer.transform.update(gradient, optimizer.transform.init(params), params)
    exact, factored = (matrix_preconditioners(optimizer, state, params, form) for form in ("exact", "factored"))
    ones = jnp.ones((6, 10))
    found, expected = (p["head"]["kernel"].apply(ones) for p in (factored, exact))
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    assert float(expected.max() / expected.min()) > 10


@pytest.mark.parametrize("form", ["identity", "exact", "factored"])
def test_twice_the_root_is_the_preconditioner(trained, form):
    gradients, preconditioners = flat(trained[3]), found(trained, form)
    half = flat(jax.jit(roots)(preconditioners))
    for name, p in flat(preconditioners).items():
        expected = np.asarray(p.apply(gradients[name]))
        twice = half[name].apply(half[name].apply(gradients[name]))
        np.testing.assert_allclose(twice, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_rate_of_zero_is_no_division_by_zero(params):
    config = dataclasses.replace(CONFIGS["muon"], adam_learning_rate=0.0)
    optimizer = make_optimizer(config, 10, params)
    found = matrix_preconditioners(optimizer, optimizer.transform.init(params), params, "factored")
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))
    np.testing.assert_array_equal(found["head"]["kernel"].apply(jnp.ones((6, 10))), 0)


def test_identity_needs_no_optimizer_of_ours(params):
    found = flat(matrix_preconditioners(optax.sgd(0.1), None, params, "identity"))
    assert found.keys() == flat(params).keys()
    assert all(p == Identity() for p in found.values())


@pytest.mark.parametrize(("form", "message"), [("diagonal", "must be one of identity"), ("exact", "make_optimizer")])
def test_what_cannot_be_is_named(params, form, message):
    with pytest.raises(UserError, match=message):
        matrix_preconditioners(optax.sgd(0.1), None, params, form)


def forms():
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    return [Identity(), Diagonal(array(5, 7)), Factored(array(5), array(7)), OutputSide(array(7, 7))]


@pytest.mark.parametrize("p", forms(), ids=lambda p: type(p).__name__)
def test_what_acts_on_factors_is_what_acts_on_gradients(p):
    draw = np.random.default_rng(1)
    a, b = (jnp.asarray(draw.normal(size=(2, 3, width)), jnp.float32) for width in (5, 7))
    outer = lambda a, b: jnp.einsum("ntd,ntf->ndf", a, b)  # noqa: E731
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)  # noqa: E731
    if not isinstance(p, Diagonal):
        close(outer(*p.of_factors(a, b)), p.apply(outer(a, b)))
    ids = jnp.asarray(draw.integers(0, 5, (2, 3)))
    units = jax.nn.one_hot(ids, 5)
    close(outer(units, p.of_rows(ids, b)), p.apply(outer(units, b)))
    close(p.at_rows(1, 4).apply(outer(a, b)[:, 1:4]), p.apply(outer(a, b))[:, 1:4])
