"""Tokens/s of the plain training step of `opus-jax train` against a bare hand-written jitted step.

Both do the same mathematics on the same rows: SimpleNorm transformer, cross entropy, clipping, AdamW. The bare one is
written out below in plain JAX and optax, with none of this package's code. They run in one process, in turn.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import Figures, alternate, run_benchmark
from opus_jax.config import Config, from_mapping
from opus_jax.distributed.mesh import make_mesh
from opus_jax.models.presets import ModelSpec, resolve
from opus_jax.training.build import optimizer_for
from opus_jax.training.feed import put_rows
from opus_jax.training.state import init_state
from opus_jax.training.step import make_step

STEPS_PER_TIMING = 10


def main() -> None:
    run_benchmark("framework_overhead", __doc__ or "", measure)


def measure(quick: bool) -> tuple[dict[str, Any], Figures]:
    config = _config()
    spec = resolve(config.model, 2048, config.corpus.row_tokens)
    rows = _rows(config)
    ours, bare = _ours(spec, config, rows), _bare(spec, config, rows)
    agreement = abs(ours(1) - bare(1))
    assert agreement < 1e-4, f"the two do not compute the same loss: they differ by {agreement}"
    for run in (ours, bare):
        run(STEPS_PER_TIMING)  # the second call still compiles, for donated buffers
    ratios = alternate(lambda: ours(STEPS_PER_TIMING), lambda: bare(STEPS_PER_TIMING), pairs=8 if quick else 40)
    setting = {
        "model": config.model.preset,
        "rows": config.batch.rows,
        "row_tokens": config.corpus.row_tokens,
        "steps_per_timing": STEPS_PER_TIMING,
        "first_loss_difference": agreement,
        "method_arms": ["tokens_per_second_ratio"],
    }
    return setting, {"tokens_per_second_ratio": ratios}


def _config() -> Config:
    return from_mapping(
        {
            "model": {"preset": "quickstart"},
            "corpus": {"row_tokens": 128},
            "batch": {"rows": 16},
            "selection": {"method": "none"},
            "optimizer": {"schedule": "constant", "warmup_steps": 0},
        }
    )


def _rows(config: Config) -> dict[str, np.ndarray]:
    shape = (config.batch.rows, config.corpus.row_tokens)
    mask = np.ones(shape, np.float32)
    mask[:, 0] = 0
    tokens = np.random.default_rng(0).integers(4, 2048, shape, dtype=np.int32)
    return {"tokens": tokens, "segment_ids": np.ones(shape, np.int32), "loss_mask": mask}


def _ours(spec: ModelSpec, config: Config, rows: dict[str, np.ndarray]) -> Any:
    mesh = make_mesh(config.mesh)
    optimizer = optimizer_for(spec, config)
    state = init_state(spec, optimizer, 0, mesh, directed=False)
    step = make_step(spec, optimizer, config, mesh)

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, put_rows(rows, mesh), None)
        return float(metrics["loss"])

    return run


# ------------------------------------------------------------------------------------ the bare counterpart


def _bare(spec: ModelSpec, config: Config, rows: dict[str, np.ndarray]) -> Any:
    optimizer, mesh = optimizer_for(spec, config), make_mesh(config.mesh)
    params = jax.tree.map(jnp.array, init_state(spec, optimizer, 0, mesh, directed=False).params)
    settings = config.optimizer
    decay = jax.tree_util.tree_map_with_path(
        lambda path, x: "kernel" in str(path[-1]) or "embedding" in str(path[-1]), params
    )
    transform = optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(
            settings.learning_rate, settings.beta1, settings.beta2, settings.eps,
            weight_decay=settings.weight_decay, mask=decay,
        ),
    )  # fmt: skip
    opt_state = transform.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        loss, gradient = jax.value_and_grad(_bare_loss, argnums=1)(spec, params, batch)
        updates, opt_state = transform.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def run(steps: int) -> float:
        nonlocal params, opt_state
        for _ in range(steps):
            params, opt_state, loss = step(params, opt_state, jax.device_put(rows))
        return float(loss)

    return run


def _bare_loss(spec: ModelSpec, params: Any, batch: Any) -> Any:
    tokens, segments, mask = batch["tokens"], batch["segment_ids"], batch["loss_mask"]
    length = tokens.shape[1]
    visible = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(length, dtype=bool)
    angles = jnp.arange(length)[:, None] * spec.rope_theta ** (-jnp.arange(0, spec.head_dim, 2) / spec.head_dim)
    x = params["embedding"]["embedding"][tokens]
    block = functools.partial(_bare_block, spec, visible, jnp.cos(angles)[:, None], jnp.sin(angles)[:, None])
    x, _ = jax.lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
    logits = _rms(x, spec.norm_eps) * params["final_norm"]["gain"] @ params["head"]["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.sum(losses * mask[:, 1:]) / jnp.sum(mask[:, 1:])


def _bare_block(spec: ModelSpec, visible: Any, cos: Any, sin: Any, x: Any, p: Any) -> Any:
    attention, mlp = p["attention"], p["mlp"]
    simple = lambda x, m: _rms(x @ m["kernel"], spec.norm_eps) * m["gain"]  # noqa: E731
    heads = lambda y: y.reshape(*y.shape[:2], spec.heads, spec.head_dim)  # noqa: E731

    def turn(y: Any) -> Any:
        a, b = jnp.split(y, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = (turn(heads(simple(x, attention[name]))) for name in ("query", "key"))
    scores = jnp.einsum("nthd,nshd->nhts", q, k) * spec.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
    mixed = jnp.einsum("nhts,nshd->nthd", weights, heads(simple(x, attention["value"]))).reshape(x.shape)
    x = x + simple(mixed, attention["output"])
    return x + simple(jax.nn.silu(simple(x, mlp["gate"])) * simple(x, mlp["up"]), mlp["down"])


def _rms(x: Any, eps: float) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


if __name__ == "__main__":
    main()
