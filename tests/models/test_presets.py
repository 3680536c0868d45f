from dataclasses import replace

import pytest

from opus_jax.config import ModelConfig
from opus_jax.errors import ConfigError
from opus_jax.models.presets import PRESETS, resolve
from opus_jax.models.transformer import parameter_count

PUBLISHED = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert parameter_count(PRESETS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in PUBLISHED])
def test_llama_shaped_counts_follow_their_formula(name):
    """Two tables, four attention maps, three MLP maps; SimpleNorm trades two gains per block for one per map."""
    s = PRESETS[name]
    kv = s.kv_heads * s.head_dim
    block = 2 * s.width**2 + 2 * s.width * kv + 3 * s.width * s.hidden
    gains = 3 * s.width + 2 * kv + 2 * s.hidden if s.norm == "simplenorm" else 2 * s.width
    assert parameter_count(s) == 2 * s.vocab_size * s.width + s.layers * (block + gains) + s.width


def test_the_small_presets_are_small():
    assert parameter_count(PRESETS["quickstart"]) <= 1_000_000
    assert parameter_count(PRESETS["tiny"]) <= 250_000


def test_a_preset_takes_the_vocabulary_of_the_tokenizer_and_the_type_of_the_machine():
    spec = resolve(ModelConfig(preset="gpt2-small"), 5000, 256)
    assert spec == replace(PRESETS["gpt2-small"], vocab_size=5000, dtype="float32")
    assert resolve(ModelConfig(preset="gpt2-small", vocab_size=5120, dtype="bfloat16"), 5000, 256).vocab_size == 5120


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm", "prenorm"), ("norm_kind", "layernorm"), ("qk_norm_axis", "head"), ("norm_eps", 1e-3),
        ("layers", 5), ("width", 256), ("hidden", 100), ("heads", 8), ("kv_heads", 2), ("head_dim", 10),
        ("vocab_size", 3000), ("activation", "gelu"), ("positions", "learned"), ("rope_theta", 5.0),
        ("max_length", 999), ("tied", True), ("init", "official"), ("remat", "full"), ("dtype", "bfloat16"),
    ],
)  # fmt: skip
def test_every_key_overrides_the_preset(key, value):
    plain = resolve(ModelConfig(preset="quickstart"), 2048, 256)
    changed = resolve(ModelConfig(preset="quickstart", **{key: value}), 2048, 256)
    assert getattr(plain, key) != value
    assert getattr(changed, key) == value


def test_shapes_follow_the_shapes_they_hang_on():
    wide = resolve(ModelConfig(width=256, heads=8), 2048, 512)
    assert (wide.hidden, wide.kv_heads, wide.head_dim, wide.max_length) == (704, 8, 32, 512)
    assert resolve(ModelConfig(width=256, activation="gelu"), 2048, 256).hidden == 1024
    assert resolve(ModelConfig(width=256, hidden=300), 2048, 256).hidden == 300
    qwen = resolve(ModelConfig(preset="qwen3-0.6b", heads=32), 2048, 256)
    assert (qwen.head_dim, qwen.kv_heads) == (128, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gpt5"}, "model.preset = 'gpt5': must be one of tiny, quickstart, gpt2-small"),
        ({"heads": 3}, "model.heads = 3: must divide model.width = 128"),
        ({"width": 130}, "model.heads = 4: must divide model.width = 130"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads = 3: must divide model.heads = 4"),
        ({"head_dim": 7}, "model.head_dim = 7: must be even with model.positions = rope"),
        ({"vocab_size": 2047}, "model.vocab_size = 2047: must be at least the tokenizer's, 2048"),
        ({"positions": "learned", "max_length": 255}, "model.max_length = 255: .* corpus.row_tokens = 256"),
        ({"bias": True}, "model.bias = True: model.norm = simplenorm .* set model.bias=false"),
        ({"preset": "gpt2-small", "norm": "simplenorm"}, "model.bias = True"),
    ],
)
def test_impossible_shapes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(**settings), 2048, 256)


def test_learned_positions_of_a_preset_must_reach_the_rows():
    with pytest.raises(ConfigError, match="max_length = 1024"):
        resolve(ModelConfig(preset="gpt2-small"), 2048, 1025)


def test_odd_heads_are_fine_without_rotation():
    assert resolve(ModelConfig(head_dim=7, positions="learned"), 2048, 256).head_dim == 7
