"""A live check of the scoring engine in use against exact per-example gradients, so that no approximation is silent."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from opus_jax.config import Config, SelectionConfig, replace
from opus_jax.distributed.axes import constrain, replicated
from opus_jax.distributed.mesh import batch_shards
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
    """Build `audit(state, candidates, proxy) -> {name: Float[""]}`, Spearman's rank correlations over a few candidates.

    audit_rank_agreement: the utilities in use (engine, window, parameters, precision, sketches and their form of the
    preconditioner), and those of whole rows by per-example gradients.
    audit_products_agreement, only where these are approximated: the inner products of pairs in use, and the exact ones
    of whole rows, over the same parameters.
    """
    count = config.selection.audit_rows

    @partial(jax.jit, out_shardings=replicated(mesh))
    def audit(state: TrainState, candidates: Batch, proxy: Batch) -> dict[str, Float[Array, ""]]:
        key = jax.random.fold_in(state.key, state.step)
        chooser = Chooser(spec, optimizer, config, state, candidates, proxy)
        proxy_gradient, v, _ = chooser.direction(key)
        repeated = jnp.arange(-(-count // batch_shards(mesh)) * batch_shards(mesh)) % count  # the kernels want no less
        rows = {name: constrain(x[repeated], batch_axes(x)) for name, x in candidates.items()}
        used = chooser.ask(v, proxy_gradient, key, rows)
        first = {name: constrain(x[:count], batch_axes(x)) for name, x in candidates.items()}
        plain = replace(spec, attention="xla")
        oracle = per_example.utilities(partial(row_losses, plain), state.params, v, first, chunk=1)
        found = {"audit_rank_agreement": rank_agreement(used.utilities[:count], oracle)}
        if approximates_products(config.selection):
            exact = replace(chooser, config=with_exact_products(config)).ask(v, proxy_gradient, key, rows)
            found["audit_products_agreement"] = rank_agreement(_pairs(used.gram, count), _pairs(exact.gram, count))
        return found

    def within_mesh(state: TrainState, candidates: Batch, proxy: Batch) -> dict[str, Float[Array, ""]]:
        with jax.set_mesh(mesh):
            return audit(state, candidates, proxy)

    return within_mesh


def approximates_products(settings: SelectionConfig) -> bool:
    """Whether redundancy is found by sketches, or in the metric of a factored preconditioner."""
    factored = settings.engine == "ghost" and settings.preconditioner == "factored"
    return bool(settings.redundancy) and (settings.sketch is not None or factored)


def with_exact_products(config: Config) -> Config:
    """The ghost engine sums them without forming a gradient (`influence/ghost/inner_products.py`)."""
    exact = replace(
        config.selection,
        engine="ghost", sketch=None, sketched_utilities=False, preconditioner="exact",
        shared=False, window=None, dtype=None, score_chunk=None,
    )  # fmt: skip
    return replace(config, selection=exact)


def _pairs(gram: Float[Array, "N N"], count: int) -> Float[Array, " P"]:
    """Products of different rows among the first so many."""
    return gram[jnp.triu_indices(count, 1)]
