from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_model import SPECS, perturbed_parameters, quick_jit

from opus_jax.config import MeshConfig
from opus_jax.distributed.axes import sharding, tree_shardings
from opus_jax.distributed.mesh import make_mesh
from opus_jax.influence import directional, per_example
from opus_jax.models import transformer
from opus_jax.models.loss import row_losses
from opus_jax.models.parameter_subset import SUBSETS, join, moving_layers, split

SPEC = replace(SPECS["simplenorm"], layers=3)
ROWS = 8


def batch():
    draw = np.random.default_rng(0)
    return {
        "tokens": jnp.asarray(draw.integers(0, 32, (ROWS, 8)), jnp.int32),
        "segment_ids": jnp.ones((ROWS, 8), jnp.int32),
        "loss_mask": jnp.ones((ROWS, 8), jnp.float32),
    }


def direction_like(params):
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), params)


def scores(spec, subset, utilities, params, v, rows):
    moving, fixed = split(params, subset)
    loss = lambda part, rows: row_losses(spec, join(part, fixed), rows)  # noqa: E731
    return utilities(loss, moving, split(v, subset)[0], rows)


def outside_is_zero(v, subset):
    """The direction with the parts that do not move set to 0, in the shape of all parameters."""
    moving, fixed = split(v, subset)
    whole = join(moving, jax.tree.map(jnp.zeros_like, fixed))
    if isinstance(whole["blocks"], tuple):
        whole["blocks"] = jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *whole["blocks"])
    return whole


@pytest.mark.parametrize("name", ["simplenorm", "GPT-2"])
def test_both_parts_together_are_the_model(name):
    spec = replace(SPECS[name], layers=3)
    params, rows = perturbed_parameters(spec), batch()
    losses = quick_jit(partial(row_losses, spec))
    expected = losses(params, rows)
    for subset in SUBSETS:
        np.testing.assert_allclose(losses(join(*split(params, subset)), rows), expected, rtol=1e-5)


@pytest.mark.parametrize("subset", SUBSETS)
def test_utilities_are_those_of_a_direction_that_is_zero_elsewhere(subset):
    """Against explicit per-example gradients of all parameters, through remat."""
    params, rows = perturbed_parameters(SPEC), batch()
    v = direction_like(params)
    found = quick_jit(partial(scores, replace(SPEC, remat="dots"), subset, directional.utilities))(params, v, rows)
    oracle = quick_jit(partial(per_example.utilities, partial(row_losses, SPEC)))
    np.testing.assert_allclose(found, oracle(params, outside_is_zero(v, subset), rows), rtol=2e-3, atol=2e-3)


def test_what_moves():
    params = perturbed_parameters(SPEC)
    tops = {"blocks", "final_norm", "head"}
    names = {subset: (set(moving), set(fixed)) for subset in SUBSETS for moving, fixed in [split(params, subset)]}
    assert names["all"] == ({"embedding", *tops}, set())
    assert names["blocks"] == ({"blocks"}, {"embedding", "final_norm", "head"})
    assert names["top_half"] == names["top_quarter"] == (tops, {"embedding", "blocks"})
    last = jax.tree.leaves(split(params, "top_quarter")[0]["blocks"])
    for part, whole in zip(last, jax.tree.leaves(params["blocks"]), strict=True):
        np.testing.assert_array_equal(part, whole[2:])


def test_a_tied_head_is_the_embedding_and_stays():
    params = perturbed_parameters(SPECS["GPT-2"])
    moving, fixed = split(params, "top_half")
    assert set(moving) == {"blocks", "final_norm"}
    assert set(fixed) == {"embedding", "positions", "blocks"}


def test_a_single_block_moves_whole():
    params = perturbed_parameters(replace(SPEC, layers=1))
    moving, fixed = split(params, "top_quarter")
    assert set(fixed) == {"embedding"}
    assert jax.tree.structure(join(moving, fixed)) == jax.tree.structure(params)


def test_shares_are_rounded_up():
    assert [moving_layers(n, "top_half") for n in (1, 2, 3, 12)] == [1, 1, 2, 6]
    assert [moving_layers(n, "top_quarter") for n in (1, 4, 5, 12)] == [1, 1, 2, 3]
    assert moving_layers(7, "all") == moving_layers(7, "blocks") == 7


def test_sharded_over_eight_devices_is_the_same():
    params, rows = perturbed_parameters(SPEC), batch()
    v, mesh = direction_like(params), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    score = partial(scores, SPEC, "top_half", directional.utilities)
    place = tree_shardings(mesh, transformer.logical_axes(SPEC), params)
    placed = {name: jax.device_put(x, sharding(mesh, ("batch", None), x.shape)) for name, x in rows.items()}
    with jax.set_mesh(mesh):
        sharded = quick_jit(score)(jax.device_put(params, place), jax.device_put(v, place), placed)
    np.testing.assert_allclose(sharded, quick_jit(score)(params, v, rows), rtol=1e-3, atol=1e-3)


def test_an_unknown_subset_is_named():
    with pytest.raises(ValueError, match="'top': must be one of all, blocks, top_half, top_quarter"):
        split({}, "top")
