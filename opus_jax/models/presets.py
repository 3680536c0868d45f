"""What a model is made of: a fully resolved `ModelSpec`, the named presets, and how a configuration picks one."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax

from opus_jax.config import ModelConfig
from opus_jax.errors import ConfigError


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer, with nothing left to decide. Hashable, so that it can be a static argument."""

    layers: int
    width: int
    hidden: int  # width of the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm: str = "prenorm"  # prenorm | prenorm_qk | simplenorm
    norm_kind: str = "rmsnorm"  # rmsnorm | layernorm
    qk_norm_axis: str = "full"  # full | head
    norm_eps: float = 1e-5
    activation: str = "swiglu"  # swiglu | gelu (tanh form)
    positions: str = "rope"  # rope | learned
    rope_theta: float = 1e4
    max_length: int = 2048  # rows of the table of learned positions; rotary ones have no end
    tied: bool = False
    bias: bool = False  # of linear maps and LayerNorms; the head never has one
    init: str = "fan_in"  # fan_in | official
    remat: str = "none"  # none | full | dots
    attention: str = "xla"  # xla | cudnn: forward mode passes the first alone
    dtype: str = "float32"  # of activations and products; parameters are float32

    @property
    def embedding_scale(self) -> float:
        """Factor on looked-up embeddings.

        A tied table has the head's scale, width^-1/2, which SimpleNorm's branches of RMS 1 would drown; no published
        tied model has SimpleNorm, so the others keep 1 and stay loadable.
        """
        return self.width**0.5 if self.tied and self.norm == "simplenorm" else 1.0


def _llama(layers: int, width: int, hidden: int, heads: int, **changes: Any) -> ModelSpec:
    """Llama 2 (arXiv 2307.09288) unless changed: RMS pre-norm, rotary positions, SwiGLU, no biases."""
    spec = ModelSpec(layers, width, hidden, heads, kv_heads=heads, head_dim=width // heads, vocab_size=32000)
    return replace(spec, **changes)


def _gpt2(layers: int, width: int, heads: int) -> ModelSpec:
    """GPT-2: LayerNorm and maps with biases, tanh GELU, learned positions, tied head."""
    return ModelSpec(
        layers=layers, width=width, hidden=4 * width, heads=heads, kv_heads=heads, head_dim=width // heads,
        vocab_size=50257, norm_kind="layernorm", activation="gelu", positions="learned", max_length=1024,
        tied=True, bias=True,
    )  # fmt: skip


def _qwen3(layers: int, width: int, hidden: int, heads: int, tied: bool) -> ModelSpec:
    """Qwen3 (arXiv 2505.09388): queries and keys normalised per head, head width 128 whatever the model width."""
    return ModelSpec(
        layers=layers, width=width, hidden=hidden, heads=heads, kv_heads=8, head_dim=128, vocab_size=151936,
        norm="prenorm_qk", qk_norm_axis="head", norm_eps=1e-6, rope_theta=1e6, tied=tied,
    )  # fmt: skip


_LLAMA3: dict[str, Any] = {"kv_heads": 8, "vocab_size": 128256, "rope_theta": 5e5}

PRESETS: dict[str, ModelSpec] = {
    "tiny": _llama(2, 64, 192, 4, norm="simplenorm", vocab_size=1024),
    "quickstart": _llama(2, 128, 320, 4, norm="simplenorm", vocab_size=2048),
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama2-1b": _llama(18, 2048, 5632, 16),
    "llama2-7b": _llama(32, 4096, 11008, 32),
    "llama3-8b": _llama(32, 4096, 14336, 32, **_LLAMA3),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, tied=False),
    # SimpleGPT (arXiv 2602.01212): Llama shapes, and its own smaller ones, with SimpleNorm.
    "simplegpt-20m": _llama(4, 256, 768, 4, norm="simplenorm"),
    "simplegpt-102m": _llama(12, 640, 1792, 10, norm="simplenorm"),
    "simplegpt-1b": _llama(18, 2048, 5632, 16, norm="simplenorm"),
    "simplegpt-7b": _llama(32, 4096, 11008, 32, norm="simplenorm"),
    "simplegpt-8b": _llama(32, 4096, 14336, 32, norm="simplenorm", **_LLAMA3),
}

DEFAULT_PRESET = "quickstart"

CUDNN_HEAD_DIM = 128  # the widest head that every GPU's fused attention takes, backward pass included


def resolve(config: ModelConfig, vocab_size: int, row_tokens: int) -> ModelSpec:
    """The preset, then the keys that are set, then what follows from both.

    A key that is null keeps the preset's value, except that shapes follow the shapes they hang on: `hidden` follows a
    changed width or activation, `head_dim` = width / heads and `kv_heads` = heads where the preset has it so.
    `vocab_size` is the tokenizer's unless set; `max_length` is `row_tokens` unless set or a table of the preset.

    Args:
      vocab_size: number of ids of the tokenizer.
      row_tokens: T, tokens in a row.

    Raises:
      ConfigError: the preset is unknown, or the shapes do not fit each other, the tokenizer or the rows; or cuDNN's
        attention is asked for and cannot be had.
    """
    name = config.preset or DEFAULT_PRESET
    if name not in PRESETS:
        raise ConfigError("model.preset", name, f"must be one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    given = {field.name: getattr(config, field.name) for field in fields(ModelSpec)}
    given = {key: value for key, value in given.items() if value is not None}
    derived = _derived_shapes(config, preset) | {"vocab_size": vocab_size, "dtype": _compute_type()}
    if preset.positions != "learned":
        derived["max_length"] = row_tokens
    spec = replace(preset, **(derived | given))
    spec = replace(spec, attention=_attention(config.attention, spec, row_tokens))
    _check_heads(spec, head_dim_is_free=config.head_dim is not None or not _splits_width(preset))
    _check_fit(spec, vocab_size, row_tokens)
    return spec


def _derived_shapes(config: ModelConfig, preset: ModelSpec) -> dict[str, Any]:
    width, heads = config.width or preset.width, config.heads or preset.heads
    activation = config.activation or preset.activation
    derived: dict[str, Any] = {}
    if (width, activation) != (preset.width, preset.activation):
        derived["hidden"] = 4 * width if activation == "gelu" else 64 * -(-8 * width // (3 * 64))
    if preset.kv_heads == preset.heads:
        derived["kv_heads"] = heads
    if _splits_width(preset):
        derived["head_dim"] = width // heads
    return derived


def _splits_width(spec: ModelSpec) -> bool:
    return spec.head_dim * spec.heads == spec.width


def _compute_type() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _attention(asked: str, spec: ModelSpec, row_tokens: int) -> str:
    """Which attention trains; auto = cuDNN's wherever it can be had."""
    if asked == "xla":
        return asked
    lacking = _lacking_for_cudnn(spec, row_tokens)
    if asked == "cudnn" and lacking:
        raise ConfigError("model.attention", asked, f"{lacking}; or set model.attention=xla")
    return "xla" if lacking else "cudnn"


def _lacking_for_cudnn(spec: ModelSpec, row_tokens: int) -> str:
    """What stands in the way of cuDNN's attention with a mask of segments; empty = nothing."""
    if jax.default_backend() != "gpu":
        return f"is for NVIDIA GPUs, and JAX runs on {jax.default_backend()} here"
    if spec.dtype != "bfloat16":
        return f"needs model.dtype=bfloat16, not {spec.dtype}"
    if spec.head_dim % 8 or spec.head_dim > CUDNN_HEAD_DIM:
        return f"needs heads of a multiple of 8 and at most {CUDNN_HEAD_DIM} channels, not {spec.head_dim}"
    if row_tokens % 2:
        return f"needs rows of an even number of tokens, not corpus.row_tokens={row_tokens}"
    return ""


def _check_heads(spec: ModelSpec, head_dim_is_free: bool) -> None:
    if not head_dim_is_free and spec.width % spec.heads:
        allowed = f"must divide model.width = {spec.width}; or set model.head_dim"
        raise ConfigError("model.heads", spec.heads, allowed)
    if spec.heads % spec.kv_heads:
        raise ConfigError("model.kv_heads", spec.kv_heads, f"must divide model.heads = {spec.heads}")
    if spec.positions == "rope" and spec.head_dim % 2:
        allowed = "must be even with model.positions = rope; change model.head_dim or model.heads"
        raise ConfigError("model.head_dim", spec.head_dim, allowed)


def _check_fit(spec: ModelSpec, vocab_size: int, row_tokens: int) -> None:
    if spec.vocab_size < vocab_size:
        raise ConfigError("model.vocab_size", spec.vocab_size, f"must be at least the tokenizer's, {vocab_size}")
    if spec.positions == "learned" and spec.max_length < row_tokens:
        allowed = f"learned positions must reach corpus.row_tokens = {row_tokens}"
        raise ConfigError("model.max_length", spec.max_length, allowed)
    if spec.norm == "simplenorm" and spec.bias:
        allowed = "model.norm = simplenorm normalises maps that have no bias; set model.bias=false"
        raise ConfigError("model.bias", spec.bias, allowed)
