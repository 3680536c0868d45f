"""Next-token cross entropy in nats, float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opus_jax.models.presets import ModelSpec
from opus_jax.models.transformer import Params, apply

Batch = dict[str, Array]  # tokens, segment_ids int32[N, T]; loss_mask float32[N, T]


def token_losses(spec: ModelSpec, params: Params, batch: Batch) -> Float[Array, "N T"]:
    """Nats of predicting `tokens[:, i]` from what stands before it, at index i; 0 where the loss mask is 0."""
    logits = apply(spec, params, batch["tokens"], batch["segment_ids"])
    # The targets move and not the logits: the logits are the largest array of the step.
    following = jnp.roll(batch["tokens"], -1, axis=1)
    nats = jnp.roll(cross_entropy(logits, following), 1, axis=1)
    return nats * targets(batch)


def row_losses(spec: ModelSpec, params: Params, batch: Batch) -> Float[Array, " N"]:
    """Mean nats per target token of each row; 0 for a row without targets."""
    nats, tokens = row_nats(spec, params, batch)
    return nats / jnp.maximum(tokens, 1)


def row_nats(spec: ModelSpec, params: Params, batch: Batch) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Sum of nats and number of target tokens of each row: sums, so that shards and microbatches add up."""
    return token_losses(spec, params, batch).sum(axis=1), targets(batch).sum(axis=1)


def batch_loss(spec: ModelSpec, params: Params, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of nats and number of target tokens of all rows."""
    nats, tokens = row_nats(spec, params, batch)
    return nats.sum(), tokens.sum()


def cross_entropy(logits: Float[Array, "N T V"], targets: Int[Array, "N T"]) -> Float[Array, "N T"]:
    """log sum exp(logits) - logits[target]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def targets(batch: Batch) -> Float[Array, "N T"]:
    """The loss mask in float32. The first token of a row has no context and is never a target."""
    return batch["loss_mask"].astype(jnp.float32).at[:, 0].set(0)
