"""The training step: one jitted function that scores a candidate buffer, selects rows from it and updates on them.

Read top to bottom: `make_step` closes over what is static; `_select` scores and picks; `_update` trains.
Quickstart, benchmarks, tests and ahead-of-time compilation all use this function and no other.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.config import Config
from opus_jax.distributed.axes import constrain, replicated, sharding
from opus_jax.influence import directional, per_example
from opus_jax.influence.chunks import deal, map_chunks
from opus_jax.influence.proxy import update_proxy_gradient
from opus_jax.models.loss import batch_loss, row_losses
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.optimizers import Optimizer
from opus_jax.optim.preconditioner import direction_with_report
from opus_jax.selection import METHODS
from opus_jax.training.state import TrainState, state_shardings

Batch = dict[str, Any]  # tokens, segment_ids int32[N, T]; loss_mask float32[N, T]
Metrics = dict[str, Any]

SCORING_METHODS = ("opus", "high_loss")


@dataclass(frozen=True)
class Step:
    """A jitted step and the mesh it runs on; tracing always happens inside the mesh, so no constraint is lost."""

    function: Any
    mesh: Mesh

    def __call__(self, state: TrainState, candidates: Batch, proxy: Batch | None) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(self.mesh):
            return self.function(state, candidates, proxy)

    def lower(self, state: TrainState, candidates: Batch, proxy: Batch | None) -> Any:
        """Lower for abstract inputs (see `abstract_state`, `abstract_batch`): nothing is allocated."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(state, candidates, proxy)


def make_step(spec: ModelSpec, optimizer: Optimizer, config: Config, mesh: Mesh) -> Step:
    """Build `step(state, candidates, proxy) -> (state, metrics)`; the state is donated.

    Args:
      spec: model shape.
      optimizer: what updates, and what gives the direction.
      config: batch, selection and proxy settings are used.
      mesh: where it runs.

    The metrics are replicated: scalars `loss` (nats per target token), `grad_norm` (before clipping), `learning_rate`,
    `update_tokens`, `nonfinite_direction`, `selected_at_random`; and per candidate, [N]: `utility`, `z`,
    `probability`, `selected`; `indices` [K] are the chosen positions, in order.
    """

    def step(state: TrainState, candidates: Batch, proxy: Batch | None) -> tuple[TrainState, Metrics]:
        proxy_gradient, indices, selection = _select(spec, optimizer, config, state, candidates, proxy)
        gradient, params, opt_state, update = _update(spec, optimizer, config, state, take(candidates, indices))
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            reference_gradient=None if state.reference_gradient is None else gradient,
            proxy_gradient=proxy_gradient,
            key=state.key,
        )
        return state, selection | update

    shardings = state_shardings(spec, optimizer, mesh, directed=is_directed(config))
    return Step(jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))), mesh)


def is_directed(config: Config) -> bool:
    """Whether the selection method needs a direction, and so the gradients kept in the state."""
    return config.selection.method == "opus"


def batch_axes(x: Any) -> tuple[str | None, ...]:
    """Rows are split over the data axes; everything else of a batch is whole."""
    return ("batch", *(None,) * (x.ndim - 1))


def abstract_batch(rows: int, row_tokens: int, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a batch of rows, as the step receives it."""
    shape, split = (rows, row_tokens), sharding(mesh, ("batch", None), (rows, row_tokens))
    types = {"tokens": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, dtype in types.items()}  # type: ignore[misc]


# -------------------------------------------------------------------------------------------- selection


def _select(
    spec: ModelSpec, optimizer: Optimizer, config: Config, state: TrainState, candidates: Batch, proxy: Batch | None
) -> tuple[Any, Int[Array, " K"], Metrics]:
    """Choose K of N candidates: the proxy gradient in use, the chosen positions, and what to log of them."""
    score_key, sample_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    warm = state.step < config.selection.warm_start_steps
    rows = candidates["tokens"].shape[0]
    proxy_gradient, nonfinite = state.proxy_gradient, jnp.zeros((), jnp.int32)
    scores = jnp.zeros((rows,), jnp.float32)
    match config.selection.method:
        case "opus":
            assert proxy is not None, "method opus needs proxy rows"
            score = partial(_utilities, spec, optimizer, config, state, candidates, proxy, score_key)
            skip = lambda: (state.proxy_gradient, scores, nonfinite)  # noqa: E731
            proxy_gradient, scores, nonfinite = jax.lax.cond(warm, skip, score)
        case "high_loss":
            losses = partial(_losses, spec, config, state.params, candidates)
            scores = jax.lax.cond(warm, lambda: scores, losses)
    # Equal scores (a warm start gives zeros) are sampled uniformly by every method.
    indices, diagnostics = METHODS[config.selection.method](
        scores, config.batch.rows, temperature=config.selection.temperature, key=sample_key
    )
    selected = jnp.zeros((rows,), bool).at[indices].set(True)
    return (
        proxy_gradient,
        indices,
        {
            "utility": scores,
            "z": diagnostics["z"],
            "probability": diagnostics["probability"],
            "selected": selected,
            "indices": indices,
            "selected_at_random": diagnostics["degenerate"],
            "nonfinite_direction": nonfinite,
        },
    )


def _utilities(
    spec: ModelSpec, optimizer: Optimizer, config: Config, state: TrainState, candidates: Batch, proxy: Batch, key: Any
) -> tuple[Any, Float[Array, " N"], Int[Array, ""]]:
    """Exact utilities <grad loss_i, v> of all candidates, with v from the proxy gradient in use."""
    proxy_gradient, v, nonfinite = selection_direction(spec, optimizer, config, state, candidates, proxy, key)
    utilities = score_rows(spec, config, state.params, v, candidates, chunk=config.selection.score_chunk)
    return proxy_gradient, utilities, nonfinite


def selection_direction(
    spec: ModelSpec, optimizer: Optimizer, config: Config, state: TrainState, candidates: Batch, proxy: Batch, key: Any
) -> tuple[Any, Any, Int[Array, ""]]:
    """(proxy gradient in use, direction v, entries of v that were not finite) at this step."""

    def fresh() -> PyTree[Float[Array, "..."]]:
        return mean_gradient(spec, state.params, proxy, config.batch.microbatch)[0]

    first = config.selection.warm_start_steps
    proxy_gradient = update_proxy_gradient(
        state.proxy_gradient, state.step, fresh, refresh=config.proxy.refresh, ema=config.proxy.ema, first_step=first
    )
    reference = state.reference_gradient
    if first == 0:  # nothing was updated yet: take the direction at the gradient of a random batch
        reference = jax.lax.cond(
            state.step == 0, lambda: _random_gradient(spec, config, state.params, candidates, key), lambda: reference
        )
    mode = config.selection.direction
    v, nonfinite = direction_with_report(optimizer, state.opt_state, state.params, reference, proxy_gradient, mode=mode)
    return proxy_gradient, v, nonfinite


def score_rows(
    spec: ModelSpec, config: Config, params: Any, v: Any, rows: Batch, *, chunk: int | None
) -> Float[Array, " N"]:
    """Utilities of rows by the configured engine, over the configured window, `chunk` rows at a time."""
    engine = {"directional": directional.utilities, "per_example": per_example.utilities}[config.selection.engine]
    return engine(partial(row_losses, spec), params, v, window(rows, config.selection.window), chunk=chunk)


def window(rows: Batch, tokens: int | None) -> Batch:
    """Rows cut to their first tokens; None = whole rows."""
    return {name: x[:, :tokens] for name, x in rows.items()}


def take(rows: Batch, indices: Int[Array, " K"]) -> Batch:
    """The rows at these positions, spread again over the batch axis."""
    return {name: constrain(x[indices], batch_axes(x)) for name, x in rows.items()}


def _losses(spec: ModelSpec, config: Config, params: Any, candidates: Batch) -> Float[Array, " N"]:
    rows = window(candidates, config.selection.window)
    return map_chunks(partial(row_losses, spec, params), rows, config.selection.score_chunk)


def _random_gradient(spec: ModelSpec, config: Config, params: Any, candidates: Batch, key: Any) -> Any:
    rows = jax.random.choice(key, candidates["tokens"].shape[0], (config.batch.rows,), replace=False)
    return mean_gradient(spec, params, take(candidates, rows), config.batch.microbatch)[0]


# ----------------------------------------------------------------------------------------------- update


def _update(
    spec: ModelSpec, optimizer: Optimizer, config: Config, state: TrainState, chosen: Batch
) -> tuple[Any, Any, Any, Metrics]:
    gradient, loss, tokens = mean_gradient(spec, state.params, chosen, config.batch.microbatch)
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(optimizer.schedule(state.step), jnp.float32),
        "update_tokens": tokens.astype(jnp.int32),
    }
    return gradient, optax.apply_updates(state.params, updates), opt_state, metrics


def mean_gradient(
    spec: ModelSpec, params: Any, batch: Batch, microbatch: int | None
) -> tuple[PyTree[Float[Array, "..."]], Float[Array, ""], Float[Array, ""]]:
    """Gradient of the mean loss per target token, that loss, and the number of target tokens.

    With `microbatch` rows at a time, sums of losses and of tokens are accumulated and divided once, so the result does
    not depend on how the rows were split.
    """

    def loss_sum(params: Any, rows: Batch) -> tuple[Array, Array]:
        return batch_loss(spec, params, rows)

    def grad_sum(rows: Batch) -> tuple[Any, Array, Array]:
        (nats, tokens), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params, rows)
        return gradient, nats, tokens

    rows = batch["tokens"].shape[0]
    if microbatch is None or microbatch >= rows:
        gradient, nats, tokens = grad_sum(batch)
    else:
        parts = deal(batch, microbatch)
        add = lambda total, rows: (jax.tree.map(jnp.add, total, grad_sum(rows)), None)  # noqa: E731
        start = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_sum, jax.tree.map(lambda x: x[0], parts)))
        (gradient, nats, tokens), _ = jax.lax.scan(add, start, parts)
    count = jnp.maximum(tokens, 1)
    return jax.tree.map(lambda g: g / count, gradient), nats / count, tokens
