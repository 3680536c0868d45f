"""The hand count against the compiler's, which counts the body of a scan once: so with one layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from opus_jax.models import transformer
from opus_jax.models.flops import forward_flops
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
