"""The hand count against the compiler's, which counts the body of a scan once: so with one layer in each stack."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from opus_jax.influence import low_rank
from opus_jax.influence.directional import utilities
from opus_jax.models import transformer
from opus_jax.models.flops import difference_flops, forward_flops, low_rank_flops, moving_flops, moving_maps
from opus_jax.models.loss import row_losses
from opus_jax.models.parameter_subset import join, split
from opus_jax.models.presets import PRESETS

TOKENS = 64
_WIDE = replace(PRESETS["tiny"], width=256, heads=4, kv_heads=2, head_dim=64, hidden=512, vocab_size=512)


def compiled_flops(spec):
    """Of one row."""
    params = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    lowered = jax.jit(lambda p, t, s: transformer.apply(spec, p, t, s)).lower(params, ids, ids)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "norm": "prenorm", "tied": True, "kv_heads": 4}])
def test_forward_flops_are_those_of_the_compiled_pass(changes):
    spec = replace(_WIDE, layers=1, **changes)
    assert compiled_flops(spec) == pytest.approx(forward_flops(spec, TOKENS), rel=0.04)


def test_layers_and_lengths_scale_as_they_should():
    one, two, three = (forward_flops(replace(_WIDE, layers=n), TOKENS) for n in (1, 2, 3))
    assert three - two == two - one
    head = 2 * TOKENS * 256 * 512
    assert one - head == two - one
    assert forward_flops(_WIDE, 2 * TOKENS) - 2 * forward_flops(_WIDE, TOKENS) == 2 * 4 * 2 * TOKENS**2 * 256


def compiled_scoring_flops(spec, subset, method, rows=1, rank=None):
    """Of the utilities of some rows."""
    params = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    ids, mask = (jax.ShapeDtypeStruct((rows, TOKENS), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = {"tokens": ids, "segment_ids": ids, "loss_mask": mask}

    def score(params, v, rows):
        moving, fixed = split(params, subset)
        loss = lambda part, rows: row_losses(spec, join(part, fixed), rows)  # noqa: E731
        if rank is not None:
            return low_rank.utilities(loss, moving, split(v, subset)[0], rows, rank=rank)
        return utilities(loss, moving, split(v, subset)[0], rows, method=method)

    return jax.jit(score).lower(params, params, batch).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("subset", "layers"), [("all", 1), ("blocks", 1), ("top_half", 2)])
def test_scoring_a_subset_costs_a_pass_and_twice_what_moves(subset, layers, tied):
    spec = replace(_WIDE, layers=layers, tied=tied)
    expected = forward_flops(spec, TOKENS) + 2 * moving_flops(spec, TOKENS, subset)
    assert compiled_scoring_flops(spec, subset, "jvp") == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("subset", "layers"), [("all", 1), ("blocks", 1), ("top_half", 2)])
def test_differences_run_twice_what_lies_above_the_fixed_blocks(subset, layers):
    spec, rows = replace(_WIDE, layers=layers), 8
    counted = compiled_scoring_flops(spec, subset, "difference", rows)
    assert counted == pytest.approx(rows * difference_flops(spec, TOKENS, subset), rel=0.05)
    assert (difference_flops(spec, TOKENS, subset) == 2 * forward_flops(spec, TOKENS)) == (subset != "top_half")


@pytest.mark.parametrize(("subset", "tied"), [("all", False), ("all", True), ("blocks", False), ("top_half", False)])
def test_a_low_rank_saves_most_of_the_directions_own_products(subset, tied):
    spec, rows, rank = replace(_WIDE, layers=2 if subset == "top_half" else 1, tied=tied), 8, 8
    factors = sum(low_rank.factor_flops(shape, rank) for shape in moving_maps(spec, subset))
    counted = compiled_scoring_flops(spec, subset, "jvp", rows, rank)
    assert counted == pytest.approx(rows * low_rank_flops(spec, TOKENS, subset, rank) + factors, rel=0.04)
    whole = forward_flops(spec, TOKENS) + 2 * moving_flops(spec, TOKENS, subset)
    if subset == "all":
        assert counted < (0.85 if tied else 0.8) * rows * whole, "the rows' products with the direction are gone"
    assert low_rank_flops(spec, TOKENS, subset, 128) < whole
    assert low_rank_flops(spec, TOKENS, subset, 256) == whole, "a matrix that gains nothing keeps its direction"


def test_what_moves_shrinks_with_the_subset():
    spec = replace(_WIDE, layers=8)
    all_, blocks, half, quarter = (moving_flops(spec, TOKENS, s) for s in ("all", "blocks", "top_half", "top_quarter"))
    head = 2 * TOKENS * 256 * 512
    assert all_ == forward_flops(spec, TOKENS)
    assert all_ - blocks == head // 2
    assert (half - head) * 2 == (quarter - head) * 4 == all_ - head
