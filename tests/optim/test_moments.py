"""Wrappers on which optax.tree_utils.tree_get fails or misleads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from opus_jax.config import OptimizerConfig
from opus_jax.errors import UserError
from opus_jax.optim.moments import find_states, muon_momentum, second_moments
from opus_jax.optim.optimizers import make_optimizer

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
GRADIENTS = [jax.tree.map(lambda p, s=s: s * p, PARAMS) for s in (2.0, -1.0)]
B2 = 0.9
EXPECTED = (0.1 * (0.9 * 4 + 1)) / (1 - 0.9**2)
ADAMW = optax.adamw(1e-2, b2=B2)


def state_after(transform, gradients=GRADIENTS, params=PARAMS):
    state = transform.init(params)
    for gradient in gradients:
        _, state = transform.update(gradient, state, params)
    return state


WRAPPED = {
    "plain": ADAMW,
    "chain": optax.chain(optax.clip_by_global_norm(1e6), ADAMW),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(1e-2), b2=B2),
    "apply_if_finite": optax.apply_if_finite(ADAMW, 3),
    "two_adams": optax.partition({"a": ADAMW, "b": ADAMW}, {"kernel": "a", "bias": "b"}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_finds_bias_corrected_moments_under(name):
    found = second_moments(state_after(WRAPPED[name]), PARAMS, B2)
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
    jax.tree.map(lambda x, p: np.testing.assert_allclose(x, jnp.full(p.shape, EXPECTED), rtol=1e-5), found, PARAMS)


def test_multi_steps_counts_updates_and_not_mini_steps():
    state = state_after(optax.MultiSteps(ADAMW, 2), [g for g in GRADIENTS for _ in range(2)])
    np.testing.assert_allclose(second_moments(state, PARAMS, B2)["bias"], EXPECTED, rtol=1e-5)


def test_masked_parameters_have_none_even_a_whole_subtree():
    params = {"frozen": {"a": jnp.ones(2), "b": jnp.ones(3)}, "free": jnp.ones(4)}
    state = optax.masked(ADAMW, {"frozen": False, "free": True}).init(params)
    found = second_moments(state, params, B2)
    assert found["frozen"] == {"a": None, "b": None}
    np.testing.assert_array_equal(found["free"], jnp.zeros(4))


def test_parameters_may_be_called_like_state_fields():
    params = {"nu": jnp.ones(2), "mu": jnp.ones(3), "count": jnp.ones(1)}
    state = state_after(ADAMW, [params], params)
    with pytest.raises(KeyError):
        optax.tree_utils.tree_get(state, "nu")
    np.testing.assert_allclose(second_moments(state, params, B2)["mu"], jnp.ones(3), rtol=1e-5)


def test_muon_has_momentum_and_no_second_moment():
    state = contrib.muon(1e-3).init(PARAMS)
    assert second_moments(state, PARAMS, B2)["kernel"] is None
    assert second_moments(state, PARAMS, B2)["bias"].shape == (2,)
    assert muon_momentum(state, PARAMS)["kernel"].shape == (3, 2)
    assert muon_momentum(state, PARAMS)["bias"] is None


def test_other_optimizers_have_none():
    state = optax.sgd(1e-2, momentum=0.9).init(PARAMS)
    assert second_moments(state, PARAMS, B2) == {"kernel": None, "bias": None}


def test_count_zero_is_zero_and_not_nan():
    assert np.all(second_moments(ADAMW.init(PARAMS), PARAMS, B2)["kernel"] == 0)


def test_moments_of_narrow_parameters_come_in_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    assert second_moments(ADAMW.init(params), params, B2)["kernel"].dtype == jnp.float32


def test_two_adams_on_one_parameter_are_refused():
    with pytest.raises(UserError, match="two Adam states"):
        second_moments(optax.chain(optax.scale_by_adam(), optax.scale_by_adam()).init(PARAMS), PARAMS, B2)


def test_state_of_another_model_is_refused():
    with pytest.raises(UserError, match="does not belong to these parameters"):
        second_moments(ADAMW.init(PARAMS), {"kernel": PARAMS["kernel"]}, B2)


def test_finds_both_parts_of_our_muon(params):
    optimizer = make_optimizer(OptimizerConfig(name="muon"), 10, params)
    state = optimizer.transform.init(params)
    nu, momentum = second_moments(state, params, B2), muon_momentum(state, params)
    pairs = zip(*(jax.tree.leaves(t, is_leaf=lambda x: x is None) for t in (nu, momentum)), strict=True)
    assert all((a is None) != (b is None) for a, b in pairs)
    assert len(find_states(state, contrib.MuonState)) == 1
