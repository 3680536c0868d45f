"""A loss or gradient that is not finite: the run stops, or, with `run.on_nonfinite` = skip, the update is left out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opus_jax.config import RunConfig
from opus_jax.errors import NonFiniteLossError
from opus_jax.training.state import TrainState


def without_nonfinite_update(
    before: TrainState, after: TrainState, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The state after a step, or, where its loss or gradient norm is not finite, the state before it, one step on.

    Chosen on the devices: no process waits for the answer.

    Returns:
      The state, and the metrics with `skipped` (bool); a skipped step has trained on no token.
    """
    sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, before)
    tokens = jnp.where(sound, metrics["update_tokens"], 0)
    return dataclasses.replace(kept, step=after.step), metrics | {"skipped": ~sound, "update_tokens": tokens}


def left_out_update(step: int, rows: list[int], metrics: dict[str, Any], left_out: int, run: RunConfig) -> str | None:
    """The warning for a step whose update was left out, None where all is well.

    Args:
      rows: the ids it was trained on.
      metrics: of the step, on the host.
      left_out: updates of the run left out so far, this one among them.

    Raises:
      NonFiniteLossError: such a step is not to be skipped, or was skipped once too often.
    """
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        return None
    values = f"the loss is {metrics['loss']} and the norm of its gradient {metrics['grad_norm']}"
    found = f"{values} at step {step}, on rows {rows}"
    if run.on_nonfinite == "stop":
        raise NonFiniteLossError(
            f"{found}: lower optimizer.learning_rate in another run.dir, or go on with run.on_nonfinite=skip; "
            "the checkpoints before this step are intact"
        )
    if left_out > run.max_skipped:
        raise NonFiniteLossError(
            f"{found}: {left_out} updates were left out, run.max_skipped = {run.max_skipped}: lower "
            "optimizer.learning_rate in another run.dir, or raise run.max_skipped and go on"
        )
    return f"{found}: no update ({left_out} left out so far)"
