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
from opus_jax.training.batches import Batch, batch_axes
from opus_jax.training.scoring import Chooser
from opus_jax.training.state import TrainState

WARN_BELOW = 0.8


def make_audit(spec: ModelSpec, optimizer: Optimizer, config: Config, mesh: Mesh) -> Any:
    """Build `audit(state, candidates, proxy) -> Float[""]`: Spearman's rank correlation, over a few candidates, between
    the configured engine's utilities, on its window and parameters, and per-example gradients of whole rows."""

    @jax.jit
    def audit(state: TrainState, candidates: Batch, proxy: Batch) -> Float[Array, ""]:
        key = jax.random.fold_in(state.key, state.step)
        chooser = Chooser(spec, optimizer, config, state, candidates, proxy)
        _, v, _ = chooser.direction(key)
        count = config.selection.audit_rows
        rows = {name: constrain(x[:count], batch_axes(x)) for name, x in candidates.items()}
        engine = chooser.score(v, key, rows)
        oracle = per_example.utilities(partial(row_losses, spec), state.params, v, rows, chunk=1)
        return rank_agreement(engine, oracle)

    def within_mesh(state: TrainState, candidates: Batch, proxy: Batch) -> Float[Array, ""]:
        with jax.set_mesh(mesh):
            return audit(state, candidates, proxy)

    return within_mesh
