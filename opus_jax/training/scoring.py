"""Scores of a candidate buffer and the choice from it, for every method that scores.

`choose` is the part of the jitted step that selection adds; what it costs is counted in `costs.py`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from opus_jax.config import Config
from opus_jax.influence import directional, per_example
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.gram import alignment_and_gram, sketched_alignment_and_gram
from opus_jax.influence.proxy import update_proxy_gradient
from opus_jax.models import parameter_subset
from opus_jax.models.loss import row_losses
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.optimizers import Optimizer
from opus_jax.optim.preconditioner import direction_with_report
from opus_jax.selection import METHODS, greats, opus, paper
from opus_jax.selection.redundancy import select_in_rounds
from opus_jax.training.batches import Batch, take, window
from opus_jax.training.state import TrainState
from opus_jax.training.update import mean_gradient

Metrics = dict[str, Any]
Gradient = PyTree[Float[Array, "..."]]

DIRECTED_METHODS = ("opus", "paper", "greats")  # need a proxy gradient
LOSS_METHODS = ("high_loss", "mid_loss")
SCORING_METHODS = (*DIRECTED_METHODS, *LOSS_METHODS)


def is_directed(config: Config) -> bool:
    """Whether the selection method needs a proxy, and so the gradients kept in the state."""
    return config.selection.method in DIRECTED_METHODS


@dataclass(frozen=True)
class Chooser:
    """What scoring closes over, and the state and rows of one step."""

    spec: ModelSpec
    optimizer: Optimizer
    config: Config
    state: TrainState
    candidates: Batch
    proxy: Batch | None

    def choose(self) -> tuple[Gradient | None, Int[Array, " K"], Metrics]:
        """(proxy gradient in use, the chosen positions, what to log of every candidate)."""
        score_key, sample_key = jax.random.split(jax.random.fold_in(self.state.key, self.state.step))
        proxy_gradient, nonfinite = self.state.proxy_gradient, jnp.zeros((), jnp.int32)
        method = self.config.selection.method
        if method == "opus":
            proxy_gradient, v, nonfinite = self.direction(score_key)
            utilities = self.score(v, score_key)
            indices, found = self._pick(utilities, v, score_key, sample_key)
        elif method in ("paper", "greats"):
            proxy_gradient = self.proxy_gradient()
            utilities, indices, found = self._pick_by_gram(proxy_gradient, score_key, sample_key)
        else:
            utilities = self._losses(score_key) if method in LOSS_METHODS else jnp.zeros((self._rows,), jnp.float32)
            indices, found = METHODS[method](utilities, self._k, **self._law(sample_key))  # type: ignore[operator]
        return proxy_gradient, indices, self._report(utilities, indices, found, nonfinite)

    def direction(self, key: Key[Array, ""]) -> tuple[Gradient, Gradient, Int[Array, ""]]:
        """(proxy gradient in use, direction v, entries of v that were not finite) at this step."""
        proxy_gradient = self.proxy_gradient()
        v, nonfinite = self._precondition(proxy_gradient, self._reference(key))
        return proxy_gradient, v, nonfinite

    def proxy_gradient(self) -> Gradient:
        """Refreshed and averaged as the configuration says; counted in scored steps."""
        config, state = self.config, self.state
        scored = (state.step - config.selection.warm_start_steps) // config.selection.select_every
        assert self.proxy is not None, f"method {config.selection.method} needs proxy rows"
        fresh = partial(mean_gradient, self.spec, state.params, self.proxy, config.batch.microbatch)
        return update_proxy_gradient(
            state.proxy_gradient, scored, lambda: fresh()[0], refresh=config.proxy.refresh, ema=config.proxy.ema
        )

    def score(self, v: Gradient, key: Key[Array, ""], rows: Batch | None = None) -> Float[Array, " N"]:
        """Utilities of rows (the candidates unless given) by the configured engine, window and parameters."""
        settings, cut = self.config.selection, self._cut(key, rows)
        moving, fixed = parameter_subset.split(self.state.params, settings.parameters)
        v, _ = parameter_subset.split(v, settings.parameters)

        def losses(part: Any, batch: Batch) -> Float[Array, " n"]:
            return self._row_losses(parameter_subset.join(part, fixed), batch)

        chunk = settings.score_chunk if rows is None else None
        if settings.engine == "per_example":
            return per_example.utilities(losses, moving, v, cut, chunk=chunk)
        return directional.utilities(losses, moving, v, cut, method=settings.derivative, chunk=chunk)

    # ------------------------------------------------------------------------------------------- picking

    def _pick(
        self, utilities: Float[Array, " N"], v: Gradient, key: Key[Array, ""], sample_key: Key[Array, ""]
    ) -> tuple[Int[Array, " K"], Metrics]:
        settings, law = self.config.selection, self._law(sample_key)
        if not settings.redundancy:
            return opus.select(utilities, self._k, **law)
        share = settings.redundancy / self._k
        reference = self._reference(key)
        pull = lambda g: self._precondition(g, reference)[0]  # noqa: E731  P^T g
        if settings.engine == "per_example":
            _, gram = alignment_and_gram(self._row_losses, self.state.params, self._cut(key), v, pull)
            return opus.select(utilities, self._k, **law, gram=share * gram.T)

        def penalty(chosen: Int[Array, " c"]) -> Float[Array, " N"]:
            """What rows already chosen take from every candidate: (lambda / K) <P g_i, sum_j g_j>."""
            cut = take(self._cut(key), chosen)
            total = jax.grad(lambda p: self._row_losses(p, cut).sum())(self.state.params)
            return self.score(pull(jax.tree.map(lambda g: share * g, total)), key)

        return select_in_rounds(utilities, self._k, **law, rounds=settings.redundancy_rounds, penalty=penalty)

    def _pick_by_gram(
        self, proxy_gradient: Gradient, key: Key[Array, ""], sample_key: Key[Array, ""]
    ) -> tuple[Float[Array, " N"], Int[Array, " K"], Metrics]:
        """The paper as written, and GREATS: inner products among candidates, over the matrices of the blocks."""
        moving, fixed = parameter_subset.split(self.state.params, "blocks")
        target, others = parameter_subset.split(proxy_gradient, "blocks")
        still = jax.tree.map(jnp.zeros_like, others)
        losses = lambda part, rows: self._row_losses(parameter_subset.join(part, fixed), rows)  # noqa: E731
        rate = jnp.asarray(self.optimizer.schedule(self.state.step), jnp.float32)
        settings, cut = self.config.selection, self._cut(key)
        if settings.method == "greats":
            alignment, gram = alignment_and_gram(losses, moving, cut, target, lambda g: g, chunk=settings.score_chunk)
            return alignment, *greats.select(alignment, gram, self._k, learning_rate=rate, key=sample_key)

        def frozen(gradient: Gradient) -> Gradient:
            whole = parameter_subset.join(gradient, still)
            mode = f"{self.config.optimizer.name}_frozen"
            product, _ = direction_with_report(
                self.optimizer, self.state.opt_state, self.state.params, whole, whole, mode=mode
            )
            return parameter_subset.split(product, "blocks")[0]

        hashes = jax.random.fold_in(self.state.key, 0)  # the same at every step
        alignment, gram = sketched_alignment_and_gram(
            losses, moving, cut, target, frozen, m=paper.SKETCH, key=hashes, chunk=settings.score_chunk
        )
        return alignment, *paper.select(alignment, gram, self._k, learning_rate=rate, key=sample_key)

    # --------------------------------------------------------------------------------------------- parts

    @property
    def _k(self) -> int:
        return self.config.batch.rows

    @property
    def _rows(self) -> int:
        return self.candidates["tokens"].shape[0]

    def _law(self, key: Key[Array, ""]) -> Metrics:
        settings = self.config.selection
        return {"temperature": settings.temperature, "entropy": settings.entropy, "key": key}

    def _row_losses(self, params: Any, rows: Batch) -> Float[Array, " n"]:
        return row_losses(self.spec, params, rows)

    def _cut(self, key: Key[Array, ""], rows: Batch | None = None) -> Batch:
        """The part of rows (the candidates unless given) that is scored."""
        settings = self.config.selection
        return window(
            self.candidates if rows is None else rows,
            settings.window,
            settings.window_place,
            jax.random.fold_in(key, 1),
        )

    def _losses(self, key: Key[Array, ""]) -> Float[Array, " N"]:
        return map_chunks(
            partial(self._row_losses, self.state.params), self._cut(key), self.config.selection.score_chunk
        )

    def _precondition(self, gradient: Gradient, reference: Gradient) -> tuple[Gradient, Int[Array, ""]]:
        state, mode = self.state, self.config.selection.direction
        return direction_with_report(self.optimizer, state.opt_state, state.params, reference, gradient, mode=mode)

    def _reference(self, key: Key[Array, ""]) -> Gradient:
        """Where the direction is taken: the last batch's gradient, or, before any update, a random batch's."""
        state = self.state
        if self.config.selection.warm_start_steps:
            return state.reference_gradient

        def random() -> Gradient:
            rows = take(self.candidates, jax.random.choice(key, self._rows, (self._k,), replace=False))
            return mean_gradient(self.spec, state.params, rows, self.config.batch.microbatch)[0]

        return jax.lax.cond(state.step == 0, random, lambda: state.reference_gradient)

    def _report(self, utilities: Any, indices: Any, found: Metrics, nonfinite: Any) -> Metrics:
        return {
            "utility": utilities,
            "z": found["z"],
            "probability": found["probability"],
            "redundancy": found["redundancy"],
            "temperature": found["temperature"],
            "selected": jnp.zeros((self._rows,), bool).at[indices].set(True),
            "indices": indices,
            "selected_at_random": found["degenerate"],
            "nonfinite_direction": nonfinite,
        }
