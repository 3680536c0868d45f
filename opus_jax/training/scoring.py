"""Scores of a candidate buffer and the choice from it, for every method that scores.

`choose` is the part of the jitted step that selection adds; what it costs is counted in `costs.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from opus_jax.config import Config
from opus_jax.data.packing import segments_per_row
from opus_jax.errors import UserError
from opus_jax.influence import directional, low_rank, per_example
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.ghost.scores import Recording, Scores
from opus_jax.influence.gram import alignment_and_gram
from opus_jax.influence.proxy import update_proxy_gradient
from opus_jax.models import parameter_subset, transformer
from opus_jax.models.loss import row_losses, targets, token_losses
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.matrix_preconditioner import matrix_preconditioners
from opus_jax.optim.optimizers import Optimizer
from opus_jax.optim.preconditioner import direction_with_report
from opus_jax.selection import METHODS, documents, greats, opus, paper
from opus_jax.selection.redundancy import select_in_rounds
from opus_jax.training.batches import Batch, take, window, without
from opus_jax.training.inner_products import InnerProducts, activation_axes
from opus_jax.training.state import TrainState
from opus_jax.training.update import Recorded, mean_gradient

Metrics = dict[str, Any]
Gradient = PyTree[Float[Array, "..."]]
Losses = Callable[[Any, Batch], Array]  # of the parameters and rows
Slopes = Callable[..., Array]  # (losses, parameters, direction, rows, chunk=)

DIRECTED_METHODS = ("opus", "paper", "greats")  # need a proxy gradient
LOSS_METHODS = ("high_loss", "mid_loss")
SCORING_METHODS = (*DIRECTED_METHODS, *LOSS_METHODS)


def is_directed(config: Config) -> bool:
    """Whether the selection method needs a proxy, and so the gradients kept in the state."""
    return config.selection.method in DIRECTED_METHODS


@dataclass(frozen=True)
class Choice:
    """The outcome of one buffer.

    Attributes:
      proxy_gradient: in use; None where the method has none.
      rows: the K rows to train on.
      report: what to log of the choice and of every candidate.
      recorded: what scoring found out for the update already (`selection.shared`).
    """

    proxy_gradient: Gradient | None
    rows: Batch
    report: Metrics
    recorded: Recorded | None


@dataclass(frozen=True)
class Chooser:
    """What scoring closes over, and the state and rows of one step."""

    spec: ModelSpec
    optimizer: Optimizer
    config: Config
    state: TrainState
    candidates: Batch
    proxy: Batch | None

    def choose(self) -> Choice:
        """Score the candidates and choose from them."""
        score_key, sample_key = jax.random.split(jax.random.fold_in(self.state.key, self.state.step))
        proxy_gradient, nonfinite = self.state.proxy_gradient, jnp.zeros((), jnp.int32)
        method, trainable, scored = self.config.selection.method, self.candidates, None
        if method == "opus":
            proxy_gradient, v, nonfinite = self.direction(score_key)
            if self.config.selection.unit == "document":
                utilities, indices, left_out, found = self._pick_documents(v, score_key, sample_key)
                trainable = without(self.candidates, left_out)
            else:
                scored = self.ask(v, proxy_gradient, score_key)
                utilities = scored.utilities
                indices, found = self._pick(scored, v, score_key, sample_key)
        elif method in ("paper", "greats"):
            proxy_gradient = self.proxy_gradient()
            utilities, indices, found = self._pick_by_gram(proxy_gradient, score_key, sample_key)
        else:
            utilities = self._losses(score_key) if method in LOSS_METHODS else jnp.zeros((self._rows,), jnp.float32)
            indices, found = METHODS[method](utilities, self._k, **self._law(sample_key))  # type: ignore[operator]
        report = self._report(utilities, indices, found) | {
            "nonfinite_direction": nonfinite,
            "document_share": _kept_targets(self.candidates, trainable, indices),
        }
        recorded = None
        if scored is not None and scored.factors is not None:
            recorded = Recorded(scored.factors, scored.losses, jnp.sum(targets(self.candidates), axis=1), indices)
        return Choice(proxy_gradient, take(trainable, indices), report, recorded)

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
        rows = window(self.proxy, config.proxy.window)
        fresh = partial(mean_gradient, self.spec, state.params, rows, config.batch.microbatch)
        return update_proxy_gradient(
            state.proxy_gradient, scored, lambda: fresh()[0], refresh=config.proxy.refresh, ema=config.proxy.ema
        )

    def ask(self, v: Gradient, proxy_gradient: Gradient, key: Key[Array, ""], rows: Batch | None = None) -> Scores:
        """Utilities of rows (the candidates unless given), and in the same pass what else the choice asks of them."""
        settings = self.config.selection
        sketches = settings.sketch is not None and (settings.redundancy or settings.sketched_utilities)
        if settings.engine == "ghost" or sketches:
            along, target = (parameter_subset.split(x, settings.parameters)[0] for x in (v, proxy_gradient))
            return self._inner_products(settings.parameters, key, rows).opus(along, target)
        return Scores(losses=None, utilities=self.score(v, key, rows))

    def score(self, v: Gradient, key: Key[Array, ""], rows: Batch | None = None) -> Float[Array, " N"]:
        """Utilities of rows (the candidates unless given), cut and along what is configured; no taps, no sketches."""
        settings, cut = self.config.selection, self._cut(key, rows)
        chunk = settings.score_chunk if rows is None else None
        score: Slopes = partial(directional.utilities, method=settings.derivative)
        if settings.engine == "per_example":
            score = per_example.utilities
        elif settings.rank is not None:
            score = partial(low_rank.utilities, rank=settings.rank)
        return self._along(score, self._row_losses, v, cut, chunk)

    def score_tokens(self, v: Gradient, cut: Batch) -> Float[Array, "N T"]:
        """Utilities of the target tokens of candidates, cut as they are scored."""
        settings = self.config.selection
        score: Slopes = partial(directional.token_utilities, method=settings.derivative)
        if settings.rank is not None:
            score = partial(low_rank.utilities, rank=settings.rank)
        return self._along(score, partial(token_losses, self._scoring_spec), v, cut, settings.score_chunk)

    def _along(self, score: Slopes, losses: Losses, v: Gradient, cut: Batch, chunk: int | None) -> Array:
        """Derivatives of the losses along v, over the configured parameters."""
        subset = self.config.selection.parameters
        moving, fixed = parameter_subset.split(self.state.params, subset)
        whole = lambda part, batch: losses(parameter_subset.join(part, fixed), batch)  # noqa: E731
        return score(whole, moving, parameter_subset.split(v, subset)[0], cut, chunk=chunk)

    # ------------------------------------------------------------------------------------------- picking

    def _pick(
        self, scored: Scores, v: Gradient, key: Key[Array, ""], sample_key: Key[Array, ""]
    ) -> tuple[Int[Array, " K"], Metrics]:
        settings, law, utilities = self.config.selection, self._law(sample_key), scored.utilities
        if not settings.redundancy:
            return opus.select(utilities, self._k, **law)
        share = settings.redundancy / self._k
        if scored.gram is not None:
            return opus.select(utilities, self._k, **law, gram=share * scored.gram)
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

    def _pick_documents(
        self, v: Gradient, key: Key[Array, ""], sample_key: Key[Array, ""]
    ) -> tuple[Float[Array, " N"], Int[Array, " K"], Bool[Array, "N S"], Metrics]:
        """(utilities of rows, sums of their documents'; chosen rows; documents not to be trained on; the law)."""
        settings, cut = self.config.selection, self._cut(key)
        segments = segments_per_row(self.config.corpus.row_tokens)
        tokens, counted = self.score_tokens(v, cut), targets(cut)
        tokens = tokens / jnp.maximum(jnp.sum(counted, axis=1, keepdims=True), 1)
        by_segment = partial(directional.sums_by_segment, segment_ids=cut["segment_ids"], segments=segments)
        utilities = jnp.sum(tokens, axis=1)
        # What is not finite in a row's padding spoils the row's loss as well.
        of_documents = jnp.where(jnp.isfinite(utilities)[:, None], by_segment(tokens), jnp.nan)
        indices, left_out, found = documents.select(
            of_documents, by_segment(counted) > 0, self._k, share=settings.ratio, **self._law(sample_key)
        )
        return utilities, indices, left_out, found

    def _pick_by_gram(
        self, proxy_gradient: Gradient, key: Key[Array, ""], sample_key: Key[Array, ""]
    ) -> tuple[Float[Array, " N"], Int[Array, " K"], Metrics]:
        """The paper as written, and GREATS: inner products among candidates, over the matrices of the blocks."""
        asked, target = self._inner_products("blocks", key), parameter_subset.split(proxy_gradient, "blocks")[0]
        rate = jnp.asarray(self.optimizer.schedule(self.state.step), jnp.float32)
        settings = self.config.selection
        if settings.method == "paper":
            found = asked.paper(target)
            chosen = paper.select(found.utilities, found.gram, self._k, learning_rate=rate, key=sample_key)
            return found.utilities, *chosen
        if settings.engine == "per_example" and settings.sketch is None:
            utilities, gram = alignment_and_gram(
                asked.losses, asked.params, asked.rows, target, lambda g: g, chunk=settings.score_chunk
            )
        else:
            found = asked.greats(target)
            utilities, gram = found.utilities, found.gram
        return utilities, *greats.select(utilities, gram, self._k, learning_rate=rate, key=sample_key)

    def _inner_products(self, subset: str, key: Key[Array, ""], rows: Batch | None = None) -> InnerProducts:
        """Over a part of the parameters; of rows that are given, all at once and without what the update would need."""
        settings, state, cut = self.config.selection, self.state, self._cut(key, rows)
        if rows is not None:
            settings = replace(settings, score_chunk=None, shared=False)
        if self.spec.tied and subset == "all" and settings.redundancy and settings.sketch is None:
            raise UserError(
                "selection.redundancy: exact products cannot take in a table that is also the head (model.tied): each "
                "use answers for itself; set selection.parameters=blocks, or selection.sketch=kron"
            )
        moving, fixed = parameter_subset.split(state.params, subset)
        form = "identity" if settings.direction == "identity" and settings.method == "opus" else settings.preconditioner

        def frozen() -> Any:
            whole = matrix_preconditioners(self.optimizer, state.opt_state, state.params, form)
            return parameter_subset.split(whole, subset)[0]

        return InnerProducts(
            settings=settings,
            losses=lambda part, rows: self._row_losses(parameter_subset.join(part, fixed), rows),
            params=moving,
            rows=cut,
            seed=jax.random.bits(jax.random.fold_in(state.key, 0), (), jnp.uint32),  # the same at every step
            frozen=frozen,
            axes=activation_axes(self.spec),
            recording=self._recording(cut) if settings.shared else None,
        )

    def _recording(self, rows: Batch) -> Recording:
        uses = transformer.matrix_uses(self.spec)
        return Recording(rows["tokens"].shape[1], self._scoring_spec.dtype, uses)

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

    @property
    def _scoring_spec(self) -> ModelSpec:
        """Forward mode and per-example gradients pass no fused attention."""
        return replace(self.spec, dtype=self.config.selection.dtype or self.spec.dtype, attention="xla")

    def _row_losses(self, params: Any, rows: Batch) -> Float[Array, " n"]:
        return row_losses(self._scoring_spec, params, rows)

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
            drawn = jnp.sort(jax.random.choice(key, self._rows, (self._k,), replace=False))
            rows = take(self.candidates, drawn)
            return mean_gradient(self.spec, state.params, rows, self.config.batch.microbatch)[0]

        return jax.lax.cond(state.step == 0, random, lambda: state.reference_gradient)

    def _report(self, utilities: Any, indices: Any, found: Metrics) -> Metrics:
        return {
            "utility": jnp.where(jnp.isfinite(utilities), utilities, -jnp.inf),
            "z": found["z"],
            "probability": found["probability"],
            "redundancy": found["redundancy"],
            "temperature": found["temperature"],
            "selected": jnp.zeros((self._rows,), bool).at[indices].set(True),
            "indices": indices,
            "selected_at_random": found["degenerate"],
            "nonfinite_utilities": found["nonfinite"],
        }


def _kept_targets(candidates: Batch, trainable: Batch, indices: Int[Array, " K"]) -> Float[Array, ""]:
    """Share of the chosen rows' target tokens that is trained on."""
    kept, all_ = (jnp.sum(jnp.sum(targets(rows), axis=1)[indices]) for rows in (trainable, candidates))
    return kept / jnp.maximum(all_, 1)
