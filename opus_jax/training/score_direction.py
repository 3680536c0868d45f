"""The direction along which a finished or running run would score its next batch, from its newest checkpoint."""

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.data.plan import initial_plan, rows_at
from opus_jax.data.proxy_rows import proxy_row_indices
from opus_jax.data.records import batch_of
from opus_jax.distributed.axes import replicated
from opus_jax.errors import UserError
from opus_jax.evaluation.bits_per_byte import spread
from opus_jax.optim.preconditioner import direction_with_report
from opus_jax.training.build import Parts
from opus_jax.training.feed import put_rows
from opus_jax.training.state import TrainState
from opus_jax.training.update import mean_gradient

PROXY_BATCHES = 16  # the target's gradient is averaged over so many times proxy.rows, where there are as many
STREAM_BATCHES = 256  # and the stream's over so many times batch.rows: its noise would count as what all rows share

Gradient = PyTree[Float[Array, "..."]]


def proxy_row_ids(parts: Parts) -> Int[np.ndarray, " R"]:
    """Rows of the proxy split that stand for the target: all of the wanted domains, or as many as are used, at equal
    distances."""
    return spread(proxy_row_indices(parts.proxy_plan()), PROXY_BATCHES * parts.config.proxy.rows)


def direction_facts(parts: Parts, relative: bool = False) -> dict[str, Any]:
    """What the direction is made of, for the scores' metadata."""
    settings, proxy = parts.config.selection, parts.config.proxy
    drawn = f"the mean gradient of {parts.config.batch.rows} training rows, as the run keeps none"
    return {
        "mode": settings.direction,
        "relative": relative,
        "parameters": settings.parameters,
        "derivative": settings.derivative,
        "optimizer_state": "the run's",
        "reference_gradient": "the run's last update" if parts.directed else drawn,
        "proxy_source": proxy.source,
        "proxy_domains": list(proxy.domains),
        "proxy_rows": len(proxy_row_ids(parts)),
    }


def score_direction(parts: Parts, state: TrainState, *, relative: bool = False) -> tuple[Gradient, int]:
    """(v, its entries that were not finite and are 0 now), as `optim.preconditioner.direction_with_report`.

    The reference gradient is the one kept by the run; where its method keeps none, that of `batch.rows` rows of its
    first plan.

    With `relative` the target's gradient g is set against the stream's, s, the mean over rows of the run's first
    plan: v = P^T (g - c s) with c = <s, P^T g> / <s, P^T s>, so that a row of the stream is worth 0 on average. What
    every row does to a model, the more the larger its gradient, no longer counts for it: else rows of high loss lead.

    Raises:
      UserError: v is 0 everywhere, so that nothing can be ranked along it.
    """
    config = parts.config
    proxy = _gradient(parts, state, "proxy", proxy_row_ids(parts), _at_once(parts))
    at_once = config.batch.microbatch or config.batch.rows
    reference = state.reference_gradient
    if reference is None:
        reference = _gradient(parts, state, "train", _drawn(parts, config.batch.rows), at_once)
    stream: Gradient | None = None
    if relative:
        stream = _gradient(parts, state, "train", _drawn(parts, STREAM_BATCHES * config.batch.rows), at_once)

    def direct(state: TrainState, reference: Gradient, proxy: Gradient, stream: Any) -> tuple[Gradient, Array, Array]:
        def pulled(gradient: Gradient) -> tuple[Gradient, Array]:
            mode = config.selection.direction
            return direction_with_report(parts.optimizer, state.opt_state, state.params, reference, gradient, mode)

        v, nonfinite = pulled(proxy)
        if stream is not None:
            v = _less(v, pulled(stream)[0], stream)
        return v, nonfinite, jax.numpy.stack([jax.numpy.any(x != 0) for x in jax.tree.leaves(v)]).any()

    whole = replicated(parts.mesh)
    with jax.set_mesh(parts.mesh):
        jitted = jax.jit(direct, out_shardings=(_like_params(parts), whole, whole))
        v, nonfinite, any_left = jitted(state, reference, proxy, stream)
    if not bool(any_left):
        raise UserError(
            f"the direction at step {int(state.step)} is 0 or not finite everywhere: the run has diverged, or its "
            "proxy rows have no targets; score another run"
        )
    return v, int(nonfinite)


def _drawn(parts: Parts, count: int) -> Int[np.ndarray, " R"]:
    """Training rows of the run's first plan."""
    return rows_at(initial_plan(parts.manifest, parts.config), parts.config.run.seed, 0, count)


def _less(v: Gradient, common: Gradient, stream: Gradient) -> Gradient:
    """v - c common, such that <stream, v - c common> = 0; v where the stream's own utility along `common` is 0."""
    along = optax.tree.vdot(stream, common)
    share = jax.numpy.where(along != 0, optax.tree.vdot(stream, v) / jax.numpy.where(along != 0, along, 1), 0)
    return jax.tree.map(lambda a, b: a - share * b, v, common)


def _gradient(parts: Parts, state: TrainState, split: str, rows: Int[np.ndarray, " R"], at_once: int) -> Gradient:
    """Gradient of the mean loss per target token over all these rows, `at_once` at a time."""
    count = -(-len(rows) // at_once) * at_once
    batch = batch_of(parts.reader(split).read(np.resize(rows, count)))
    batch["loss_mask"][len(rows) :] = 0  # what fills up the last rows at once
    function = jax.jit(lambda p, b: mean_gradient(parts.spec, p, b, at_once)[0], out_shardings=_like_params(parts))
    with jax.set_mesh(parts.mesh):
        return function(state.params, put_rows(batch, parts.mesh))


def _at_once(parts: Parts) -> int:
    rows, micro = parts.config.proxy.rows, parts.config.batch.microbatch
    return rows if micro is None else min(rows, micro)


def _like_params(parts: Parts) -> Any:
    return jax.tree.map(lambda x: x.sharding, parts.abstract_state().params)
