"""Rank agreement of utilities with the true effect of a candidate, for every way of making the direction.

The true effect of a candidate is the change of the proxy loss when it takes the place of one of the K rows of a random
batch, under the real optimizer's update, the displacement scaled by 0.1 (where a first-order score can be right) and
by 1.0 (where overshoot shows). Losses are float64. Spearman's rank correlation over the candidates; repetitions are
checkpoints along a run. `spearman.<optimizer>.<direction>` averages the settings {simplenorm, prenorm} x {clip,
noclip}, which are also given one by one.
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from benchmarks.harness import Figures, run_benchmark
from opus_jax.config import Config, from_mapping, replace
from opus_jax.data.buffers import every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.data.records import RowReader
from opus_jax.influence import directional
from opus_jax.models.loss import batch_loss, row_losses
from opus_jax.optim.preconditioner import direction
from opus_jax.training.build import Parts, build
from opus_jax.training.feed import put_rows
from opus_jax.training.state import TrainState, init_state
from opus_jax.training.update import mean_gradient

SCALES = {"spearman": 0.1, "spearman_full_step": 1.0}
MODES = {"vjp": "vjp", "frozen": "{optimizer}_frozen", "identity": "identity"}
CANDIDATES = 64
CLIP = 0.1  # below every gradient norm of these runs, so that clipping is always active
STEPS_BETWEEN, CHECKPOINTS = 100, 5


def main() -> None:
    run_benchmark("score_quality", __doc__ or "", measure)


def measure(quick: bool) -> tuple[dict[str, Any], Figures]:
    every, count = (40, 1) if quick else (STEPS_BETWEEN, CHECKPOINTS)
    figures: Figures = {}
    for optimizer in ("adamw", "muon"):
        for norm in ("simplenorm", "prenorm"):
            for clip in (CLIP, None):
                config = _config(optimizer, norm, clip, steps=every * count)
                print(f"{optimizer} {norm} clip={clip}: {every * count} steps", file=sys.stderr, flush=True)
                for key, value in _agreements(config, every, count):
                    figures.setdefault(key, []).append(value)
                    figures.setdefault(f"{key}.{norm}.{'clip' if clip else 'noclip'}", []).append(value)
    config = _config("adamw", "simplenorm", CLIP, 1)
    setting = {
        "corpus": config.corpus.name,
        "domains": config.corpus.domains,
        "proxy": config.proxy.domains,
        "model": config.model.preset,
        "batch_rows": config.batch.rows,
        "row_tokens": config.corpus.row_tokens,
        "candidates": CANDIDATES,
        "learning_rate": config.optimizer.learning_rate,
        "clip": CLIP,
        "checkpoint_steps": [every * (i + 1) for i in range(count)],
        "method_arms": ["spearman.adamw.vjp", "spearman.muon.vjp"],
    }
    return setting, dict(sorted(figures.items()))


def _config(optimizer: str, norm: str, clip: float | None, steps: int) -> Config:
    return from_mapping(
        {
            "corpus": {
                "name": "debian",
                "domains": ["fiction", "python-docs", "databases", "biology"],
                "max_bytes": 4_000_000,
                "row_tokens": 64,
            },
            "tokenizer": {"vocab_size": 1024},
            "model": {"preset": "tiny", "norm": norm},
            "optimizer": {"name": optimizer, "clip": clip, "schedule": "constant", "learning_rate": 0.003},
            "batch": {"rows": 16},
            # Infinite temperature: the run trains on random rows, and its state holds what a direction needs.
            "selection": {"method": "opus", "temperature": float("inf"), "audit_every": 0, "warm_start_steps": 1},
            "proxy": {"domains": ["python-docs"], "rows": 16},
            "run": {"steps": steps},
        }
    )


def _agreements(config: Config, every: int, count: int) -> Any:
    """(key, Spearman) at every checkpoint of one run."""
    parts = build(config)
    state = init_state(parts.spec, parts.optimizer, 0, parts.mesh, directed=True)
    candidates = _stream(parts, "train", parts.candidate_plan(), config.candidates)
    proxies = _stream(parts, "proxy", parts.proxy_plan(), config.proxy.rows)
    probes = _stream(parts, "train", parts.candidate_plan(), CANDIDATES + config.batch.rows, seed=1)
    displacements, utilities = jax.jit(partial(_displacements, parts)), jax.jit(partial(_utilities, parts))
    for step in range(1, every * count + 1):
        proxy = proxies()
        state, _ = parts.step(state, candidates(), proxy)
        if step % every == 0:
            rows = probes()
            batch = {name: x[: config.batch.rows] for name, x in rows.items()}
            pool = {name: x[config.batch.rows :] for name, x in rows.items()}
            effects = _effects(parts, state.params, displacements(state, batch, pool), proxy)
            for mode, scores in utilities(state, pool, proxy).items():
                for key, effect in effects.items():
                    yield (
                        f"{key}.{config.optimizer.name}.{mode}",
                        float(spearmanr(np.asarray(scores), effect).statistic),
                    )


def _stream(parts: Parts, split: str, plan: Any, rows: int, seed: int = 0) -> Any:
    stream = CandidateStream(RowReader(parts.records, split), plan, seed, every_step(rows))
    return lambda: put_rows(next(stream), parts.mesh)


def _utilities(parts: Parts, state: TrainState, pool: Any, proxy: Any) -> dict[str, Any]:
    """Utilities of the candidates under each direction, by the engine that training uses."""
    gradient, _, _ = mean_gradient(parts.spec, state.params, proxy, None)
    utilities = {}
    for mode, name in MODES.items():
        name = name.format(optimizer=parts.config.optimizer.name)
        v = direction(parts.optimizer, state.opt_state, state.params, state.reference_gradient, gradient, mode=name)
        utilities[mode] = directional.utilities(partial(row_losses, parts.spec), state.params, v, pool)
    return utilities


def _displacements(parts: Parts, state: TrainState, batch: Any, pool: Any) -> Any:
    """[64, ...] parameter displacements of the real update, each candidate in the place of the batch's first row."""

    def gradient_sum(rows: Any) -> Any:
        (_, tokens), gradient = jax.value_and_grad(partial(batch_loss, parts.spec), has_aux=True)(state.params, rows)
        return gradient, tokens

    others, tokens = gradient_sum({name: x[1:] for name, x in batch.items()})

    def displacement(row: Any) -> Any:
        own, count = gradient_sum({name: x[None] for name, x in row.items()})
        mean = jax.tree.map(lambda a, b: (a + b) / (tokens + count), others, own)
        return parts.optimizer.transform.update(mean, state.opt_state, state.params)[0]

    return jax.lax.map(displacement, pool)


def _effects(parts: Parts, params: Any, displacements: Any, proxy: Any) -> dict[str, np.ndarray]:
    """Decrease of the float64 proxy loss by each displacement, at each scale."""
    with jax.enable_x64(True):
        spec = replace(parts.spec, dtype="float64")
        wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)  # noqa: E731
        base, moves, rows = wide(params), wide(displacements), {k: jnp.asarray(np.asarray(x)) for k, x in proxy.items()}

        @jax.jit
        def losses(scale: Any) -> Any:
            moved = lambda move: jax.tree.map(lambda p, d: p + scale * d, base, move)  # noqa: E731
            return jax.lax.map(lambda move: batch_loss(spec, moved(move), rows)[0], moves)

        return {key: -np.asarray(losses(jnp.float64(scale))) for key, scale in SCALES.items()}


if __name__ == "__main__":
    main()
