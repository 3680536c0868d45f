"""A live check of the scoring engine in use against exact per-example gradients, so that no approximation is silent."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from opus_jax.config import Config
from opus_jax.distributed.axes import constrain
from opus_jax.influence import per_example
from opus_jax.influence.audit import rank_agreement
from opus_jax.models.loss import row_losses
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.optimizers import Optimizer
from opus_jax.training.state import TrainState
from opus_jax.training.step import Batch, batch_axes, score_rows, selection_direction

WARN_BELOW = 0.8


def make_audit(spec: ModelSpec, optimizer: Optimizer, config: Config, mesh: Mesh) -> Any:
    """Build `audit(state, candidates, proxy) -> Float[""]`: Spearman's rank correlation, over a few candidates, between
    the configured engine's utilities on its window and per-example gradients of whole rows."""

    @jax.jit
    def audit(state: TrainState, candidates: Batch, proxy: Batch) -> Float[Array, ""]:
        key = jax.random.fold_in(state.key, state.step)
        _, v, _ = selection_direction(spec, optimizer, config, state, candidates, proxy, key)
        count = config.selection.audit_rows
        rows = {name: constrain(x[:count], batch_axes(x)) for name, x in candidates.items()}
        engine = score_rows(spec, config, state.params, v, rows, chunk=None)
        oracle = per_example.utilities(partial(row_losses, spec), state.params, v, rows, chunk=1)
        return rank_agreement(engine, oracle)

    def within_mesh(state: TrainState, candidates: Batch, proxy: Batch) -> Float[Array, ""]:
        with jax.set_mesh(mesh):
            return audit(state, candidates, proxy)

    return within_mesh
