"""The model written a second time, in numpy and float64, one document and one head at a time; and small models."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.models import transformer
from opus_jax.models.presets import ModelSpec

_SMALL = ModelSpec(layers=2, width=16, hidden=24, heads=4, kv_heads=2, head_dim=4, vocab_size=32, max_length=16)

SPECS = {
    "simplenorm": replace(_SMALL, norm="simplenorm"),
    "simplenorm, per head": replace(_SMALL, norm="simplenorm", qk_norm_axis="head", head_dim=6),
    "simplenorm, LayerNorm, learned positions, tied, GELU": replace(
        _SMALL, norm="simplenorm", norm_kind="layernorm", positions="learned", tied=True, activation="gelu"
    ),
    "Llama": replace(_SMALL, norm="prenorm"),
    "GPT-2": replace(
        _SMALL, kv_heads=4, norm_kind="layernorm", positions="learned", tied=True, activation="gelu", bias=True
    ),
    "query and key norm": replace(_SMALL, norm="prenorm_qk"),
    "Qwen3": replace(_SMALL, norm="prenorm_qk", qk_norm_axis="head", head_dim=6, tied=True, norm_eps=1e-6),
}


# Tiny arrays, run once: compiling quickly matters and running quickly does not.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def perturbed_parameters(spec: ModelSpec):
    """Kernels of about unit gain, gains near 1, biases near 0: drawn by numpy, which compiles nothing."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))

    def draw(path, leaf):
        name = path[-1].key
        scale = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.3
        return jnp.asarray((name == "gain") + scale * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def reference_logits(spec: ModelSpec, params, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one document of T tokens that starts at position 0."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embedding"]["embedding"][tokens]
    if spec.positions == "learned":
        x = x + params["positions"]["embedding"][: len(tokens)]
    if spec.norm == "simplenorm" and spec.tied:
        x = x * np.sqrt(spec.width)
    for layer in range(spec.layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        x = x + _attention(spec, block["attention"], _pre_norm(spec, block, "attention_norm", x))
        x = x + _mlp(spec, block["mlp"], _pre_norm(spec, block, "mlp_norm", x))
    x = _norm(spec, params["final_norm"], x)
    return x @ (params["embedding"]["embedding"].T if spec.tied else params["head"]["kernel"])


def _pre_norm(spec, block, name, x):
    return _norm(spec, block[name], x) if name in block else x


def _norm(spec, parameters, x):
    if spec.norm_kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * parameters["gain"] + parameters.get("bias", 0)


def _map(spec, parameters, x, heads=1):
    """A linear map; with SimpleNorm, `heads` equal slices of its output are normalised one by one."""
    y = x @ parameters["kernel"] + parameters.get("bias", 0)
    if spec.norm != "simplenorm":
        return y
    gains = np.split(parameters["gain"], heads)
    return np.concatenate([_norm(spec, {"gain": g}, z) for g, z in zip(gains, np.split(y, heads, -1), strict=True)], -1)


def _attention(spec, parameters, x):
    per_head = spec.qk_norm_axis == "head"
    q = _map(spec, parameters["query"], x, spec.heads if per_head else 1)
    k = _map(spec, parameters["key"], x, spec.kv_heads if per_head else 1)
    v = _map(spec, parameters["value"], x)
    if spec.norm == "prenorm_qk" and not per_head:
        q, k = _norm(spec, parameters["query_norm"], q), _norm(spec, parameters["key_norm"], k)
    mixed = []
    for head in range(spec.heads):
        group = head // (spec.heads // spec.kv_heads)
        q_h = q[:, head * spec.head_dim : (head + 1) * spec.head_dim]
        k_h = k[:, group * spec.head_dim : (group + 1) * spec.head_dim]
        v_h = v[:, group * spec.head_dim : (group + 1) * spec.head_dim]
        if spec.norm == "prenorm_qk" and per_head:
            q_h, k_h = _norm(spec, parameters["query_norm"], q_h), _norm(spec, parameters["key_norm"], k_h)
        if spec.positions == "rope":
            q_h, k_h = _rotate(q_h, spec.rope_theta), _rotate(k_h, spec.rope_theta)
        scores = np.where(np.tri(len(x)), q_h @ k_h.T / np.sqrt(spec.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v_h)
    return _map(spec, parameters["output"], np.concatenate(mixed, -1))


def _rotate(x, theta):
    """Rotation as multiplication of complex numbers x[i] + j x[i + d/2]."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-2 * np.arange(half) / x.shape[1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def _mlp(spec, parameters, x):
    up = _map(spec, parameters["up"], x)
    if spec.activation == "gelu":
        hidden = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    else:
        gate = _map(spec, parameters["gate"], x)
        hidden = gate / (1 + np.exp(-gate)) * up
    return _map(spec, parameters["down"], hidden)
