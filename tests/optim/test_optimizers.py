import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from optax import contrib

from opus_jax.config import MeshConfig, OptimizerConfig
from opus_jax.distributed.axes import tree_shardings
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import ConfigError, UserError
from opus_jax.optim.moments import find_states
from opus_jax.optim.optimizers import make_optimizer, opt_state_logical_axes

ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=0, schedule="constant")
MUON = dataclasses.replace(ADAMW, name="muon")
AXES = {
    "blocks": {
        "mlp": {"kernel": ("layer", "embed", "mlp"), "bias": ("layer", "mlp")},
        "norm": {"gain": ("layer", "embed")},
    },
    "embedding": {"embedding": ("vocab", "embed")},
    "head": {"kernel": ("embed", "vocab")},
    "final_norm": {"gain": ("embed",)},
}


def steps(transform, params, gradients):
    """Last update and state, after one update per gradient at fixed parameters."""
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(gradient, state, params)
    return updates, state


def assert_trees_close(first, second, rtol=1e-5, atol=1e-8):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), first, second)


def test_adamw_is_the_textbook_update(params, random_like):
    config = dataclasses.replace(ADAMW, clip=None, weight_decay=0.3)
    gradients = [random_like(seed, params) for seed in (1, 2)]
    updates, _ = steps(make_optimizer(config, 10, params).transform, params, gradients)

    def expected(decays, p, first, second):
        m, v = (1 - 0.9) * (0.9 * first + second), (1 - 0.95) * (0.95 * first**2 + second**2)
        m, v = m / (1 - 0.9**2), v / (1 - 0.95**2)
        return -1e-2 * (m / (np.sqrt(v) + 1e-8) + 0.3 * decays * p)

    decays = {
        "blocks": {"mlp": {"kernel": 1, "bias": 0}, "norm": {"gain": 0}},
        "embedding": {"embedding": 1},
        "head": {"kernel": 1},
        "final_norm": {"gain": 0},
    }
    assert_trees_close(updates, jax.tree.map(expected, decays, params, *gradients), rtol=1e-4)


@pytest.mark.parametrize("config", [ADAMW, MUON])
@pytest.mark.parametrize("decay_all", [False, True])
def test_decay_reaches_vectors_only_when_asked(config, decay_all, params):
    config = dataclasses.replace(config, decay_all=decay_all, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = steps(make_optimizer(config, 10, params).transform, params, [zero])
    assert_trees_close(updates["head"], jax.tree.map(lambda p: -1e-2 * 0.5 * p, params["head"]))
    kernel = params["blocks"]["mlp"]["kernel"]
    np.testing.assert_allclose(updates["blocks"]["mlp"]["kernel"], -1e-2 * 0.5 * kernel, rtol=1e-5)
    assert bool(jnp.any(updates["final_norm"]["gain"] != 0)) == decay_all
    assert bool(jnp.any(updates["blocks"]["norm"]["gain"] != 0)) == decay_all


def newton_schulz(x):
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_orthogonalises_each_layer_by_itself(params, random_like):
    config = dataclasses.replace(MUON, weight_decay=0.0, clip=None)
    gradient = random_like(1, params)
    updates, state = steps(make_optimizer(config, 10, params).transform, params, [gradient])
    kernel, expected = updates["blocks"]["mlp"]["kernel"], []
    for layer in gradient["blocks"]["mlp"]["kernel"]:
        # The first step's momentum is along the gradient, and Newton-Schulz is scale-invariant.
        expected.append(newton_schulz(layer / jnp.linalg.norm(layer)))
    np.testing.assert_allclose(kernel, -1e-2 * 0.2 * 8**0.5 * jnp.stack(expected), rtol=1e-4, atol=1e-7)
    (muon,) = find_states(state, contrib.MuonState)
    assert muon.mu["blocks"]["mlp"]["kernel"].shape == (2, 6, 8)
    assert muon.mu["embedding"]["embedding"] == optax.MaskedNode()


def test_muon_moves_as_far_as_adamw_does():
    params = {"blocks": {"kernel": jnp.zeros((3, 64, 48))}}
    gradient = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (3, 64, 48))}}
    updates, _ = steps(make_optimizer(MUON, 10, params).transform, params, [gradient])
    assert float(jnp.sqrt(jnp.mean(updates["blocks"]["kernel"] ** 2))) == pytest.approx(0.2 * 1e-2, rel=0.25)


def test_muons_other_half_is_plain_adamw_with_our_betas_and_its_own_rate(params, random_like):
    """optax.contrib.muon would give NAdam with b2 = 0.999 at Muon's rate."""
    settings = {"clip": None, "weight_decay": 0.0}
    gradients = [random_like(seed, params) for seed in (1, 2, 3)]
    half, _ = steps(
        make_optimizer(dataclasses.replace(MUON, adam_learning_rate=5e-2, **settings), 10, params).transform,
        params,
        gradients,
    )
    whole, _ = steps(
        make_optimizer(dataclasses.replace(ADAMW, learning_rate=5e-2, **settings), 10, params).transform,
        params,
        gradients,
    )
    for part in ("embedding", "head", "final_norm"):
        assert_trees_close(half[part], whole[part])
    assert_trees_close(half["blocks"]["norm"], whole["blocks"]["norm"])
    trap, _ = steps(contrib.muon(5e-2), params, gradients)
    assert not np.allclose(trap["final_norm"]["gain"], whole["final_norm"]["gain"], rtol=1e-2)


ADAMW_CHANGES = [
    {"learning_rate": 2e-2},
    {"schedule": "linear"},
    {"warmup_steps": 5},
    {"weight_decay": 0.5},
    {"decay_all": True},
    {"beta1": 0.5},
    {"beta2": 0.5},
    {"eps": 1.0},
    {"clip": 0.01},
    {"clip": None},
    {"name": "muon"},
]
MUON_CHANGES = [{"learning_rate": 2e-2}, {"adam_learning_rate": 3e-2}, {"momentum": 0.5}]


@pytest.mark.parametrize(("config", "changes"), [(ADAMW, ADAMW_CHANGES), (MUON, MUON_CHANGES)])
def test_every_key_changes_the_update(config, changes, params, random_like):
    gradients = [random_like(seed, params) for seed in (1, 2)]

    def updates(config):
        return jax.tree.leaves(steps(make_optimizer(config, 3, params).transform, params, gradients)[0])

    before = updates(config)
    for change in changes:
        after = updates(dataclasses.replace(config, **change))
        same = [np.allclose(a, b, rtol=1e-6) for a, b in zip(before, after, strict=True)]
        assert not all(same), change


def test_clipping_bounds_the_gradient_before_the_moments(params, random_like):
    config = dataclasses.replace(ADAMW, clip=0.5)
    _, state = steps(make_optimizer(config, 10, params).transform, params, [random_like(1, params)])
    (adam,) = find_states(state, optax.ScaleByAdamState)
    assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1 * 0.5, rel=1e-5)


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_twin_has_the_same_state_and_nearly_the_same_update(config, params, random_like):
    optimizer = make_optimizer(config, 10, params)
    gradients = [random_like(seed, params) for seed in (1, 2, 3)]
    _, state = steps(optimizer.transform, params, gradients)
    real, real_state = optimizer.transform.update(gradients[0], state, params)
    twin, twin_state = optimizer.twin.update(gradients[0], state, params)
    assert jax.tree.structure(real_state) == jax.tree.structure(twin_state)
    assert_trees_close(real_state, twin_state, rtol=1e-4, atol=1e-7)
    assert_trees_close(real, twin, rtol=1e-3, atol=1e-7)


def test_twin_takes_a_unit_rate_where_the_rate_is_zero(params, random_like):
    config = dataclasses.replace(MUON, schedule="linear", final_share=0.0, adam_learning_rate=5e-3, weight_decay=0.0)
    optimizer = make_optimizer(config, 1, params)
    assert float(optimizer.schedule(5)) == 0
    assert float(optimizer.rates["muon"](5)) == 1
    assert float(optimizer.rates["adam"](5)) == pytest.approx(0.5)  # the groups keep their proportion
    assert float(optimizer.rates["muon"](0)) == pytest.approx(1e-2)
    frozen = make_optimizer(dataclasses.replace(ADAMW, learning_rate=0.0), 10, params)
    assert float(frozen.rates["adam"](3)) == 1
    updates, _ = steps(frozen.transform, params, [random_like(1, params)])
    assert all(float(jnp.max(jnp.abs(u))) == 0 for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_moments_are_float32_and_lie_as_their_parameters(config, params):
    optimizer, mesh = make_optimizer(config, 10, params), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = jax.eval_shape(optimizer.transform.init, params)
    logical = opt_state_logical_axes(optimizer, params, AXES)
    state = jax.jit(optimizer.transform.init, out_shardings=tree_shardings(mesh, logical, shapes))(params)
    (adam,) = find_states(state, optax.ScaleByAdamState)
    assert adam.nu["head"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert adam.count.sharding.is_fully_replicated
    holder = find_states(state, contrib.MuonState)[0] if config.name == "muon" else adam
    assert holder.mu["blocks"]["mlp"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert {x.dtype.name for x in jax.tree.leaves((adam.mu, adam.nu, holder.mu))} == {"float32"}


def test_axes_follow_paths_not_names():
    params = {"mu": jnp.zeros((4, 2)), "count": jnp.zeros(3), "inner": {"mu": jnp.zeros((2, 4))}}
    axes = {"mu": ("a", "b"), "count": ("c",), "inner": {"mu": ("d", "e")}}
    logical = opt_state_logical_axes(optax.MultiSteps(optax.adamw(1e-3), 2), params, axes)
    assert logical.acc_grads == axes
    (adam,) = find_states(logical, optax.ScaleByAdamState)
    assert (adam.mu, adam.nu, adam.count) == (axes, axes, ())


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_sharded_update_equals_the_unsharded_one(config):
    shapes = {"blocks": {"kernel": (4, 32, 64)}, "embedding": (64, 32)}
    axes = {"blocks": {"kernel": ("layer", "embed", "mlp")}, "embedding": ("vocab", "embed")}
    is_tuple = lambda s: isinstance(s, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jax.random.normal(jax.random.key(s[0]), s), shapes, is_leaf=is_tuple)
    gradient = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    optimizer, mesh = make_optimizer(config, 10, params), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    expected, _ = steps(optimizer.transform, params, [gradient])
    place = lambda tree: jax.device_put(tree, tree_shardings(mesh, axes, tree))  # noqa: E731
    with jax.set_mesh(mesh):
        sharded = jax.jit(lambda g, p: steps(optimizer.transform, p, [g])[0])(place(gradient), place(params))
    assert_trees_close(sharded, expected, rtol=1e-4, atol=1e-6)


def test_parameters_narrower_than_float32_are_refused():
    """Adam's second moment takes the parameter's type, and stalls at half its value in bfloat16."""
    with pytest.raises(UserError, match=r"head/kernel is bfloat16.*float32 parameters"):
        make_optimizer(ADAMW, 10, {"head": {"kernel": jnp.zeros((2, 2), jnp.bfloat16)}})


def test_muon_without_block_matrices_and_unknown_names_are_refused():
    params = {"kernel": jnp.zeros((2, 2))}
    with pytest.raises(ConfigError, match=r"optimizer\.name.*'blocks'"):
        make_optimizer(MUON, 10, params)
    with pytest.raises(ConfigError, match="adamw, muon"):
        make_optimizer(dataclasses.replace(ADAMW, name="sgd"), 10, params)
