"""Where cuDNN's attention is used, where not, and that it is given what XLA's is; by a stand-in, for want of a GPU."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.test_step import TOKENS, config

from opus_jax.config import ModelConfig
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import ConfigError
from opus_jax.models import attention
from opus_jax.models.attention import attend, attention_mask
from opus_jax.models.presets import resolve
from opus_jax.training.batches import abstract_batch
from opus_jax.training.build import optimizer_for
from opus_jax.training.state import abstract_state
from opus_jax.training.step import make_step

SEGMENTS = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 3, 3]])


@pytest.fixture
def fused(monkeypatch):
    """JAX's function with XLA behind it, and, as cuDNN's, without a forward-mode rule; lists the shapes it is given."""
    calls = []

    def stand_in(queries, keys, values, *, mask, implementation):
        assert implementation == "cudnn"
        calls.append(queries.shape)
        plain = lambda *qkv: original(*qkv, mask=mask, implementation="xla")  # noqa: E731
        rule = jax.custom_vjp(plain)
        rule.defvjp(lambda *qkv: jax.vjp(plain, *qkv), lambda pull, g: pull(g))
        return rule(queries, keys, values)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", stand_in)
    return calls


def heads(tokens, seed=0):
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.standard_normal((2, tokens, n, 8)), jnp.float32) for n in (4, 2, 2)]


def test_segments_and_grouped_heads_are_as_with_xla(fused):
    mask = attention_mask(SEGMENTS)
    loss = lambda how: lambda *qkv: jnp.sum(jnp.sin(attend(*qkv, mask, how)))  # noqa: E731
    found, expected = (jax.value_and_grad(loss(how), (0, 1, 2))(*heads(6)) for how in ("cudnn", "xla"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert fused == [(2, 6, 4, 8)]


def test_an_odd_number_of_tokens_stays_with_xla(fused):
    mask = attention_mask(SEGMENTS[:, :5])
    np.testing.assert_array_equal(attend(*heads(5), mask, "cudnn"), attend(*heads(5), mask))
    assert fused == []


def test_training_is_fused_and_scoring_keeps_forward_mode(fused, caplog):
    """With a fused attention on its way the directional engine would take differences, and say so."""
    settings = config("model.layers=1")
    spec = replace(resolve(settings.model, 64, TOKENS), attention="cudnn")
    mesh, optimizer = make_mesh(settings.mesh, jax.devices()[:1]), optimizer_for(spec, settings)
    state = abstract_state(spec, optimizer, mesh, directed=True)
    rows = [abstract_batch(n, TOKENS, mesh) for n in (16, 8)]
    with caplog.at_level(logging.WARNING, "opus_jax"):
        make_step(spec, optimizer, settings, mesh).lower(state, *rows)
    assert "differences" not in caplog.text
    assert {shape[0] for shape in fused} == {8}, "the proxy's and the update's rows, not the 16 candidates"
    assert len(fused) >= 2


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_auto_takes_cudnn_wherever_it_can_be_had(on_a_gpu):
    assert resolve(ModelConfig(preset="gpt2-small"), 50257, 1024).attention == "cudnn"
    assert resolve(ModelConfig(preset="qwen3-8b"), 151936, 4096).attention == "cudnn"
    assert resolve(ModelConfig(preset="gpt2-small", attention="xla"), 50257, 1024).attention == "xla"
    assert resolve(ModelConfig(preset="gpt2-small", dtype="float32"), 50257, 1024).attention == "xla"
    assert resolve(ModelConfig(preset="gpt2-small"), 50257, 1023).attention == "xla"


def test_elsewhere_attention_is_xlas():
    assert resolve(ModelConfig(preset="gpt2-small", dtype="bfloat16"), 50257, 1024).attention == "xla"
    with pytest.raises(ConfigError, match=r"model\.attention = .?cudnn.*GPUs.*runs on cpu.*model\.attention=xla"):
        resolve(ModelConfig(attention="cudnn"), 512, 64)


@pytest.mark.parametrize(
    ("settings", "tokens", "reason"),
    [
        ({"dtype": "float32"}, 64, r"model\.dtype=bfloat16"),
        ({"head_dim": 12}, 64, "multiple of 8"),
        ({"head_dim": 256}, 64, "at most 128"),
        ({}, 63, r"even number.*corpus\.row_tokens=63"),
    ],
)
def test_what_cudnn_has_not_is_refused(on_a_gpu, settings, tokens, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve(ModelConfig(preset="tiny", attention="cudnn", **settings), 512, tokens)
