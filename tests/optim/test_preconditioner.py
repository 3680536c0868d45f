import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from scipy.stats import spearmanr

from opus_jax.config import OptimizerConfig
from opus_jax.errors import UserError
from opus_jax.optim.optimizers import Optimizer, make_optimizer
from opus_jax.optim.preconditioner import direction, direction_with_report

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="linear", clip=1.0)
SHAPES = {"blocks": {"kernel": (2, 3, 4), "gain": (2, 4)}, "head": (4, 3)}
STACKED = {"blocks": {"kernel": contrib.MuonDimensionNumbers(1, 2), "gain": None}, "head": None}
ADAMW = optax.adamw(1e-2, b2=0.95, eps=1e-6)


def tree(seed):
    draw = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s)), SHAPES, is_leaf=is_shape)


def dot(a, b):
    return float(sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))))


def compiled(optimizer, mode="vjp"):
    return jax.jit(lambda *args: direction_with_report(optimizer, *args, mode=mode))


def prepared(config):
    """A pair of our optimizer and its first state."""
    optimizer = make_optimizer(config, 10, tree(0))
    return optimizer, optimizer.transform.init(tree(0))


TRANSFORMS = {
    "sgd": lambda p: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: ADAMW,
    "chain": lambda p: optax.chain(optax.clip_by_global_norm(0.7), ADAMW, optax.scale(0.5)),
    "masked": lambda p: optax.masked(ADAMW, {"blocks": True, "head": False}),
    "inject_hyperparams": lambda p: optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        optax.linear_schedule(1e-2, 1e-3, 10), mask=lambda q: jax.tree.map(lambda x: x.ndim > 1, q)
    ),
    "apply_if_finite": lambda p: optax.apply_if_finite(ADAMW, 3),
    "muon": lambda p: contrib.muon(1e-2, muon_weight_dimension_numbers=STACKED, consistent_rms=0.2),
    "our_adamw": lambda p: make_optimizer(CONFIG, 10, p),
    "our_muon": lambda p: make_optimizer(dataclasses.replace(CONFIG, name="muon"), 10, p),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_direction_is_minus_the_transposed_derivative_of_the_update(name):
    """Against central differences of the update that trains, in float64; clipping is active in ours."""
    with jax.enable_x64(True):
        params, reference, proxy, probe = tree(0), tree(1), tree(2), tree(3)
        optimizer = TRANSFORMS[name](params)
        transform = optimizer.transform if isinstance(optimizer, Optimizer) else optimizer
        step = 1e-5

        @jax.jit
        def both(earlier):
            _, state = transform.update(earlier, transform.init(params), params)
            moved = lambda s: jax.tree.map(lambda g, w: g + s * w, reference, probe)  # noqa: E731
            updates = jax.vmap(lambda s: transform.update(moved(s), state, params)[0])(jnp.array([step, -step]))
            change = jax.tree.map(lambda u: (u[0] - u[1]) / (2 * step), updates)
            return direction_with_report(optimizer, state, params, reference, proxy), change

        (v, nonfinite), change = both(tree(4))
        assert int(nonfinite) == 0
        # Our twin has a floor under the second moments, which the update that trains has not.
        assert dot(v, probe) == pytest.approx(-dot(proxy, change), rel=1e-3 if name.startswith("our") else 1e-6)


@pytest.mark.parametrize(("as_pair", "mini_steps_done"), [(False, 0), (True, 1)])
def test_multi_steps_is_differentiated_where_it_emits(as_pair, mini_steps_done):
    params, reference, proxy = tree(0), tree(1), tree(2)
    steps = optax.MultiSteps(ADAMW, 3)
    state = steps.init(params)
    for _ in range(mini_steps_done):
        _, state = steps.update(tree(5), state, params)
    optimizer = steps.gradient_transformation() if as_pair else steps
    v, _ = compiled(optimizer)(state, params, reference, proxy)
    expected, _ = compiled(ADAMW)(ADAMW.init(params), params, reference, proxy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), v, expected)
    assert dot(v, v) > 0


def test_multi_steps_inside_another_transformation_is_refused():
    nested = optax.chain(optax.clip(1.0), optax.MultiSteps(ADAMW, 3).gradient_transformation())
    with pytest.raises(UserError, match="outermost"):
        direction(nested, nested.init(tree(0)), tree(0), tree(1), tree(2))


def test_sgd_and_identity_give_the_proxy_gradient_with_the_same_sign():
    params, reference, proxy = tree(0), tree(1), tree(2)
    sgd = optax.sgd(0.25)
    v = direction(sgd, sgd.init(params), params, reference, proxy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.25 * b, rtol=1e-6), v, proxy)
    np.testing.assert_array_equal(
        direction(sgd, sgd.init(params), params, reference, proxy, mode="identity")["head"], proxy["head"]
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_modes_differ_and_agree_in_sign(name):
    optimizer, state = prepared(dataclasses.replace(CONFIG, name=name, clip=None))
    params, reference, proxy = tree(0), tree(1), tree(2)
    frozen, exact = (
        compiled(optimizer, mode)(state, params, reference, proxy)[0] for mode in (f"{name}_frozen", "vjp")
    )
    assert dot(frozen, proxy) > 0
    assert not np.allclose(frozen["head"], exact["head"], rtol=1e-2)


def test_modes_that_do_not_fit_are_refused():
    params = tree(0)
    optimizer = make_optimizer(CONFIG, 10, params)
    state = optimizer.transform.init(params)
    with pytest.raises(UserError, match=r"muon_frozen needs optimizer\.name = muon"):
        direction(optimizer, state, params, tree(1), tree(2), mode="muon_frozen")
    with pytest.raises(UserError, match="adamw_frozen needs"):
        direction(ADAMW, ADAMW.init(params), params, tree(1), tree(2), mode="adamw_frozen")
    with pytest.raises(UserError, match="must be one of vjp, adamw_frozen, muon_frozen, identity"):
        direction(optimizer, state, params, tree(1), tree(2), mode="exact")


# ------------------------------------------------------------------------------------------- NaN guards


def test_never_seen_rows_are_nan_in_plain_adamw_counted_and_set_to_zero():
    params = {"embedding": jnp.ones((5, 3))}
    reference, proxy = {"embedding": jnp.ones((5, 3)).at[2].set(0)}, {"embedding": jnp.ones((5, 3))}
    plain = optax.adamw(1e-2)
    v, nonfinite = compiled(plain)(plain.init(params), params, reference, proxy)
    assert int(nonfinite) == 3
    assert nonfinite.dtype == jnp.int32
    assert np.all(v["embedding"][2] == 0)
    ours = make_optimizer(CONFIG, 10, params)
    v, nonfinite = compiled(ours)(ours.transform.init(params), params, reference, proxy)
    assert int(nonfinite) == 0
    assert np.all(np.isfinite(v["embedding"]))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_zero_reference_before_any_update_is_finite(name):
    params = tree(0)
    zero = jax.tree.map(jnp.zeros_like, params)
    optimizer, state = prepared(dataclasses.replace(CONFIG, name=name))
    v, nonfinite = compiled(optimizer)(state, params, zero, tree(2))
    assert int(nonfinite) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(v))


def test_zero_rate_gives_the_direction_of_a_unit_rate():
    params, reference, proxy = tree(0), tree(1), tree(2)
    still = prepared(dataclasses.replace(CONFIG, learning_rate=0.0))
    unit = prepared(dataclasses.replace(CONFIG, learning_rate=1.0, schedule="constant"))
    pair = [compiled(o)(state, params, reference, proxy)[0] for o, state in (still, unit)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *pair)


# ------------------------------------------------------------------------------- clipping and the reference


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def classroom(draw, rows, noise):
    """Rows of two kinds: half obey the target's rule, half another one; noise spreads them."""
    x = draw.normal(size=(rows, 6))
    rule = np.where(np.arange(rows)[:, None] % 2 == 0, 1.0, -1.0)
    y = rule * np.sin(x[:, :2]) + noise * draw.normal(size=(rows, 2))
    return jnp.asarray(x), jnp.asarray(y)


def true_effects(transform, state, params, batch, candidates, target):
    """Fall of the target loss when a candidate replaces the batch's last row; the real update, displaced by a tenth."""
    x, y = batch
    gradient = jax.grad(loss)

    def after(cx, cy):
        g = gradient(params, jnp.concatenate([x[:-1], cx[None]]), jnp.concatenate([y[:-1], cy[None]]))
        updates, _ = transform.update(g, state, params)
        return loss(jax.tree.map(lambda p, u: p + 0.1 * u, params, updates), *target)

    return -jax.vmap(after)(*candidates)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_under_clipping_only_the_update_batch_is_a_fit_reference(name):
    """Clipping is scale-invariant: at the proxy gradient its derivative removes the proxy gradient itself."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        params = {"hidden": jnp.asarray(draw.normal(size=(6, 8)) / 2), "out": jnp.asarray(draw.normal(size=(8, 2)) / 2)}
        ours = make_optimizer(dataclasses.replace(CONFIG, clip=0.1), 100, params)
        optimizer = {"adamw": ours, "sgd": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))}[name]
        transform = ours.transform if name == "adamw" else optimizer
        past = jax.tree.map(lambda *x: jnp.stack(x), *(classroom(draw, 16, 0.3) for _ in range(20)))
        batch, candidates = classroom(draw, 16, 0.3), classroom(draw, 64, 0.3)
        x, y = classroom(draw, 64, 0.0)
        target = (x[::2], y[::2])

        def train(carry, rows):
            updates, state = transform.update(jax.grad(loss)(carry[0], *rows), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        @jax.jit
        def scores_and_truth(start):
            (params, state), _ = jax.lax.scan(train, (start, transform.init(start)), past)
            reference, proxy = jax.grad(loss)(params, *batch), jax.grad(loss)(params, *target)
            rows = jax.vmap(lambda a, b: jax.grad(loss)(params, a[None], b[None]))(*candidates)
            score = lambda v: sum(jnp.tensordot(rows[k], v[k], 2) for k in rows)  # noqa: E731
            at = [score(direction(optimizer, state, params, g, proxy)) for g in (reference, proxy)]
            return at, true_effects(transform, state, params, batch, candidates, target), optax.tree.norm(reference)

        (at_batch, at_proxy), truth, norm = scores_and_truth(params)
        assert float(norm) > 0.1
        assert spearmanr(at_batch, truth).statistic > 0.9
        if name == "adamw":
            assert spearmanr(at_proxy, truth).statistic < 0.5
        else:  # nothing but rounding is left
            assert float(jnp.max(jnp.abs(at_proxy))) < 1e-12 * float(jnp.max(jnp.abs(at_batch)))
