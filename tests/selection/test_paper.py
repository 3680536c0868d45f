from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opus_jax.config import OptimizerConfig, SelectionConfig
from opus_jax.models import transformer
from opus_jax.models.loss import batch_loss, row_losses
from opus_jax.models.presets import PRESETS
from opus_jax.optim.matrix_preconditioner import matrix_preconditioners
from opus_jax.optim.optimizers import make_optimizer
from opus_jax.selection import opus, paper
from opus_jax.training.inner_products import InnerProducts
from tests.selection.oracle import sequential

KEY = jax.random.key(0)
RATE = 1e-3
SPEC = replace(PRESETS["tiny"], width=16, heads=2, kv_heads=2, head_dim=8, hidden=32, vocab_size=64)


def text_like(rows, seed, alphabet=64):
    """Rows that count upwards with now and then a jump: learnable, and unlike each other by their alphabet."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random((rows, 32)) < 0.1, random.integers(0, alphabet, (rows, 32)), 1)
    tokens = jnp.asarray(np.cumsum(steps, axis=1) % alphabet, jnp.int32)
    return {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "loss_mask": jnp.ones(tokens.shape)}


@pytest.fixture(scope="module")
def trained():
    """(optimizer, its state, parameters) after some AdamW steps, so that P is made of real gradients."""
    params = transformer.init(SPEC, jax.random.key(1))
    config = OptimizerConfig(learning_rate=RATE, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(config, 100, params)

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: batch_loss(SPEC, p, batch)[0])(params)
        updates, state = optimizer.transform.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = [text_like(8, seed) for seed in range(20)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, stacked))((params, optimizer.transform.init(params)))
    return optimizer, state, params


@pytest.fixture(scope="module")
def products(trained):
    """Alignment and Gram matrix of a mixed buffer, sketched as published, P being the frozen AdamW product."""
    optimizer, state, params = trained
    halves = [text_like(16, 50), text_like(16, 51, alphabet=5)]
    buffer = jax.tree.map(lambda *x: jnp.concatenate(x), *halves)

    @jax.jit
    def scored(params, state):
        proxy = jax.grad(lambda p: row_losses(SPEC, p, text_like(8, 52)).mean())(params)
        settings = SelectionConfig(method="paper", engine="per_example")
        losses = lambda p, rows: row_losses(SPEC, p, rows)  # noqa: E731
        frozen = lambda: matrix_preconditioners(optimizer, state, params, "exact")  # noqa: E731
        found = InnerProducts(settings, losses, params, buffer, jnp.uint32(0), frozen).paper(proxy)
        return found.utilities, found.gram

    return scored(params, state)


def test_as_published_rows_are_drawn_uniformly_to_within_a_percent(products):
    alignment, gram = products
    _, found = paper.select(alignment, gram, 16, learning_rate=RATE, key=KEY)
    assert float(jnp.std(alignment)) > 0
    assert np.abs(32 * np.asarray(found["probability"], np.float64) - 1).max() < 0.01
    _, standardised = opus.select(alignment, 16, temperature=paper.TEMPERATURE, key=KEY)
    assert 32 * float(standardised["probability"].max()) > 2


def test_even_with_the_rate_left_out_once_rows_are_drawn_uniformly_to_within_a_percent(products):
    """P holds the rate already; the largest term that any reading of the equations leaves is <P g_i, g_proxy>."""
    alignment, gram = products
    _, found = paper.select(alignment, gram, 16, learning_rate=1.0, key=KEY)
    assert np.abs(32 * np.asarray(found["probability"], np.float64) - 1).max() < 0.01


def test_the_rows_are_chosen_as_often_as_by_chance(products):
    alignment, gram = products
    pick = jax.jit(jax.vmap(lambda key: paper.select(alignment, gram, 16, learning_rate=RATE, key=key)[0]))
    counts = np.bincount(np.asarray(pick(jax.random.split(KEY, 2000))).ravel(), minlength=32)
    spread = np.sqrt(2000 * 0.25)
    assert np.abs(counts - 1000).max() < 4.5 * spread


def large_terms():
    random = np.random.default_rng(2)
    features = random.normal(size=(6, 4))
    return jnp.asarray(random.normal(size=6), jnp.float32), jnp.asarray(features @ features.T, jnp.float32)


def test_is_the_equations_worked_out_by_hand():
    alignment, gram = large_terms()
    pick = jax.jit(lambda key: paper.select(alignment, gram, 3, learning_rate=0.8, key=key))
    for seed in range(10):
        key = jax.random.key(seed)
        order = sequential(0.8 * alignment, 0.64 * gram, 3, 0.9, key, self_term=False, scale=1.0)
        np.testing.assert_array_equal(pick(key)[0], sorted(order))


@pytest.mark.parametrize("broken", [1, 6])
def test_broken_candidates_come_last_and_nothing_is_nan(broken):
    alignment, gram = large_terms()
    indices, found = paper.select(
        alignment.at[:broken].set(jnp.nan), gram.at[:broken].set(jnp.nan), 5, learning_rate=1.0, key=KEY
    )
    assert len(set(indices.tolist())) == 5
    if broken == 1:
        assert 0 not in indices.tolist()
    assert all(np.isfinite(x).all() for x in found.values())
    assert float(found["probability"].sum()) == pytest.approx(1)
