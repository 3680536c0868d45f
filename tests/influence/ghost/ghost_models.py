"""Models of every kind of linear map, with rows, a direction, and each row's own gradient."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.config import ModelConfig
from opus_jax.influence.per_example import per_example_gradients
from opus_jax.models import presets, transformer
from opus_jax.models.loss import row_losses

ROWS, TOKENS, VOCABULARY = 8, 12, 32
KINDS = {
    "simplenorm": {"preset": "tiny", "remat": "full"},
    "llama-gqa": {"preset": "llama2-1b", "heads": 4, "kv_heads": 2, "head_dim": 4, "remat": "dots"},
    "qwen3-tied": {"preset": "qwen3-0.6b", "heads": 4, "kv_heads": 2, "head_dim": 4, "tied": True},
    "gpt2": {"preset": "gpt2-small", "heads": 4, "max_length": TOKENS},
}


class Case(NamedTuple):
    spec: Any
    losses: Any
    params: Any
    direction: Any
    batch: Any
    gradients: Any  # [N, ...], the oracle's


def noise_like(seed, tree):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), tree)


def make_case(**changes):
    config = ModelConfig(**{"layers": 2, "width": 16, "hidden": 24, "heads": 2} | changes)
    spec = replace(presets.resolve(config, VOCABULARY, TOKENS), dtype="float32")
    params = jax.jit(partial(transformer.init, spec))(jax.random.key(0))
    params = jax.tree.map(lambda x, n: x + 0.1 * n, params, noise_like(7, params))  # no bias or gain is special
    draw = np.random.default_rng(0)
    segments = np.array([1] * 5 + [2] * 5 + [0] * 2)
    targets = (segments > 0) & (segments == np.roll(segments, 1))
    batch = {
        "tokens": jnp.asarray(draw.integers(0, VOCABULARY, (ROWS, TOKENS)), jnp.int32),
        "segment_ids": jnp.asarray(np.tile(segments, (ROWS, 1)), jnp.int32),
        "loss_mask": jnp.asarray(np.tile(targets, (ROWS, 1)), jnp.float32).at[:, 0].set(0),
    }
    losses = partial(row_losses, spec)
    gradients = jax.jit(lambda: per_example_gradients(losses, params, batch))()
    return Case(spec, losses, params, noise_like(3, params), batch, gradients)
