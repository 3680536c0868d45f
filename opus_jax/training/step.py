"""The training step: one jitted function that scores a candidate buffer, selects rows from it and updates on them.

Read top to bottom: a step that chooses is `scoring.Chooser.choose` and `update.update`; one that does not is the update
alone. Quickstart, benchmarks, tests and ahead-of-time compilation all use these functions and no others.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opus_jax.config import Config
from opus_jax.distributed.axes import replicated
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.optimizers import Optimizer
from opus_jax.training.batches import Batch, is_unreadable
from opus_jax.training.nonfinite import without_nonfinite_update
from opus_jax.training.scoring import Choice, Chooser, is_directed
from opus_jax.training.state import TrainState, state_shardings
from opus_jax.training.update import update

Metrics = dict[str, Any]


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


def make_step(spec: ModelSpec, optimizer: Optimizer, config: Config, mesh: Mesh, *, chooses: bool = True) -> Step:
    """Build `step(state, candidates, proxy) -> (state, metrics)`; the state is donated.

    Args:
      spec: model shape.
      optimizer: what updates, and what gives the direction.
      config: batch, selection and proxy settings are used.
      mesh: where it runs.
      chooses: False = a step of a warm start, or between two scorings: K rows come in and all are trained on.

    The metrics are replicated: scalars `loss` (nats per target token), `grad_norm` (before clipping), `learning_rate`,
    `update_tokens`, `seen_tokens` (targets of all rows that came in), and `row_loss` [K] in the order of `indices`;
    where rows are chosen also the scalars `nonfinite_direction`, `nonfinite_utilities` (candidates),
    `selected_at_random`, `temperature` (in use), `document_share` (of the chosen rows' target tokens, those trained
    on), and per candidate, [N]: `utility` (-inf where it is not finite), `z`, `probability`, `redundancy`, `selected`;
    `indices` [K] are the chosen positions, in order. With `run.on_nonfinite` = skip also `skipped`, with
    `corpus.lenient` also `unreadable` [N].
    """

    def step(state: TrainState, candidates: Batch, proxy: Batch | None) -> tuple[TrainState, Metrics]:
        choice = Choice(state.proxy_gradient, candidates, report={}, recorded=None)
        if chooses:
            choice = Chooser(spec, optimizer, config, state, candidates, proxy).choose()
        gradient, params, opt_state, metrics = update(
            spec, optimizer, config.batch.microbatch, state, choice.rows, choice.recorded
        )
        after = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            reference_gradient=None if state.reference_gradient is None else gradient,
            proxy_gradient=choice.proxy_gradient,
            key=state.key,
        )
        if config.run.on_nonfinite == "skip":
            after, metrics = without_nonfinite_update(state, after, metrics)
        if config.corpus.lenient:
            metrics["unreadable"] = is_unreadable(candidates)
        seen = jnp.sum(candidates["loss_mask"] > 0, dtype=jnp.int32)
        return after, choice.report | metrics | {"seen_tokens": seen}

    shardings = state_shardings(spec, optimizer, mesh, directed=is_directed(config))
    return Step(jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))), mesh)
