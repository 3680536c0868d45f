"""Two models with per-example losses: an MLP on a plain pytree, and our transformer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import ModelConfig
from opus_jax.models import presets, transformer
from opus_jax.models.loss import row_losses, token_losses


def noise_like(seed, tree):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), tree)


def mlp_losses(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["layers"][0] + params["bias"])
    return jnp.sum((hidden @ params["layers"][1] - batch["y"]) ** 2, axis=1)


@pytest.fixture
def mlp():
    """(loss_fn, params, direction, batch of 16)."""
    params = {"layers": [jnp.zeros((5, 7)), jnp.zeros((7, 3))], "bias": jnp.zeros(7)}
    batch = {"x": jnp.zeros((16, 5)), "y": jnp.zeros((16, 3))}
    return mlp_losses, noise_like(0, params), noise_like(1, params), noise_like(2, batch)


@pytest.fixture(scope="session")
def language_model():
    """(spec, row loss, token loss, params, direction, batch of 8 rows of 12 tokens in two segments and padding)."""
    config = ModelConfig(preset="tiny", layers=2, width=16, hidden=24, heads=2)
    spec = presets.resolve(config, 32, 12)
    params = transformer.init(spec, jax.random.key(0))
    draw = np.random.default_rng(0)
    segments = np.array([1] * 5 + [2] * 5 + [0] * 2)
    targets = (segments > 0) & (segments == np.roll(segments, 1))
    batch = {
        "tokens": jnp.asarray(draw.integers(0, 32, (8, 12)), jnp.int32),
        "segment_ids": jnp.asarray(np.tile(segments, (8, 1)), jnp.int32),
        "loss_mask": jnp.asarray(np.tile(targets, (8, 1)), jnp.float32).at[:, 0].set(0),
    }
    return spec, partial(row_losses, spec), partial(token_losses, spec), params, noise_like(3, params), batch
