"""The update: the mean gradient of a batch, a few rows at a time, and an ordinary optimizer step on it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.influence.chunks import deal, gather
from opus_jax.influence.ghost.shared import gradient_of_rows
from opus_jax.models.loss import row_nats
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.optimizers import Optimizer
from opus_jax.training.batches import Batch
from opus_jax.training.state import TrainState

Gradient = PyTree[Float[Array, "..."]]


@dataclass(frozen=True)
class Recorded:
    """What a scoring pass over all N candidates left for the update of K of them.

    Attributes:
      factors: like the parameters; see `influence/ghost/shared.py`.
      losses: [N], nats per target token.
      tokens: [N], targets.
      indices: [K], the chosen rows.
    """

    factors: Any
    losses: Float[Array, " N"]
    tokens: Float[Array, " N"]
    indices: Int[Array, " K"]


def update(
    spec: ModelSpec,
    optimizer: Optimizer,
    microbatch: int | None,
    state: TrainState,
    chosen: Batch,
    recorded: Recorded | None = None,
) -> tuple[Gradient, Any, Any, dict[str, Array]]:
    """(gradient, params, optimizer state, metrics) after one step on the chosen rows, recorded already or not."""
    if recorded is None:
        gradient, loss, tokens, row_loss = mean_gradient_and_rows(spec, state.params, chosen, microbatch)
    else:
        gradient, loss, tokens, row_loss = _of_recorded(state.params, recorded)
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "row_loss": row_loss,
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(optimizer.schedule(state.step), jnp.float32),
        "update_tokens": tokens.astype(jnp.int32),
    }
    return gradient, optax.apply_updates(state.params, updates), opt_state, metrics


def _of_recorded(
    params: Any, recorded: Recorded
) -> tuple[Gradient, Float[Array, ""], Float[Array, ""], Float[Array, " K"]]:
    """As `mean_gradient_and_rows`, of the chosen rows."""
    row_loss, row_tokens = recorded.losses[recorded.indices], recorded.tokens[recorded.indices]
    tokens = jnp.sum(row_tokens)
    count = jnp.maximum(tokens, 1)
    gradient = gradient_of_rows(params, recorded.factors, recorded.tokens / count, recorded.indices)
    return gradient, jnp.sum(row_loss * row_tokens) / count, tokens, row_loss


def mean_gradient(
    spec: ModelSpec, params: Any, batch: Batch, microbatch: int | None
) -> tuple[Gradient, Float[Array, ""], Float[Array, ""]]:
    """Gradient of the mean loss per target token, that loss, and the number of target tokens."""
    return mean_gradient_and_rows(spec, params, batch, microbatch)[:3]


def mean_gradient_and_rows(
    spec: ModelSpec, params: Any, batch: Batch, microbatch: int | None
) -> tuple[Gradient, Float[Array, ""], Float[Array, ""], Float[Array, " N"]]:
    """As `mean_gradient`, and each row's mean nats per target token.

    With `microbatch` rows at a time, sums of losses and of tokens are accumulated and divided once, so the result does
    not depend on how the rows were split.
    """

    def loss_sum(params: Any, rows: Batch) -> tuple[Array, tuple[Array, Array]]:
        nats, tokens = row_nats(spec, params, rows)
        return nats.sum(), (tokens.sum(), nats / jnp.maximum(tokens, 1))

    def grad_sum(rows: Batch) -> tuple[tuple[Any, Array, Array], Array]:
        (nats, (tokens, row_loss)), gradient = jax.value_and_grad(loss_sum, has_aux=True)(params, rows)
        return (gradient, nats, tokens), row_loss

    if microbatch is None or microbatch >= batch["tokens"].shape[0]:
        total, row_loss = grad_sum(batch)
    else:
        parts = deal(batch, microbatch)

        def add(total: Any, rows: Batch) -> tuple[Any, Array]:
            sums, losses = grad_sum(rows)
            return jax.tree.map(jnp.add, total, sums), losses

        first = jax.eval_shape(lambda rows: grad_sum(rows)[0], jax.tree.map(lambda x: x[0], parts))
        total, losses = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, first), parts)
        row_loss = gather(losses)
    gradient, nats, tokens = total
    count = jnp.maximum(tokens, 1)
    return jax.tree.map(lambda g: g / count, gradient), nats / count, tokens, row_loss
