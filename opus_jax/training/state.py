"""Everything a training step changes, as one plain pytree."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opus_jax.distributed.axes import place, replicated, tree_shardings
from opus_jax.models import transformer
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.optimizers import Optimizer, opt_state_logical_axes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state between two steps. A tree of the same form holds its shapes, or its shardings.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32 parameters.
      opt_state: optax state, float32 moments.
      reference_gradient: like params, mean update-batch gradient of the last step, where the next direction is taken;
        kept only by methods that need a direction, otherwise None.
      proxy_gradient: like params, the proxy gradient in use (refresh, EMA), otherwise None.
      key: typed key; a step folds its number into it, so the state carries no random history.
    """

    step: Any
    params: Any
    opt_state: Any
    reference_gradient: Any
    proxy_gradient: Any
    key: Any


def init_state(
    spec: ModelSpec, optimizer: Optimizer, seed: int, mesh: Mesh, *, directed: bool, params: Any = None
) -> TrainState:
    """Initialise the whole state under one jit, every leaf on the mesh, scalars too.

    Args:
      directed: keep the gradients from which a selection direction is made.
      params: weights to start from (already on the host), instead of fresh ones.
    """

    def build() -> TrainState:
        return _build(spec, optimizer, seed, directed)

    with jax.set_mesh(mesh):
        state = jax.jit(build, out_shardings=state_shardings(spec, optimizer, mesh, directed=directed))()
    if params is None:
        return state
    placed = jax.tree.map(lambda new, old: place(np.asarray(new, old.dtype), old.sharding), params, state.params)
    return TrainState(state.step, placed, state.opt_state, state.reference_gradient, state.proxy_gradient, state.key)


def abstract_state(spec: ModelSpec, optimizer: Optimizer, mesh: Mesh, *, directed: bool) -> TrainState:
    """The state's shapes, types and shardings, without arrays."""
    shapes = jax.eval_shape(lambda: _build(spec, optimizer, 0, directed))
    shardings = state_shardings(spec, optimizer, mesh, directed=directed)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def state_shardings(spec: ModelSpec, optimizer: Optimizer, mesh: Mesh, *, directed: bool) -> TrainState:
    """A NamedSharding for every leaf; moments and gradients lie as their parameters do."""
    shapes = jax.eval_shape(lambda: _build(spec, optimizer, 0, directed))
    logical = transformer.logical_axes(spec)
    like_params = tree_shardings(mesh, logical, shapes.params)
    return TrainState(
        step=replicated(mesh),
        params=like_params,
        opt_state=tree_shardings(mesh, opt_state_logical_axes(optimizer, shapes.params, logical), shapes.opt_state),
        reference_gradient=like_params if directed else None,
        proxy_gradient=like_params if directed else None,
        key=replicated(mesh),
    )


def _build(spec: ModelSpec, optimizer: Optimizer, seed: int, directed: bool) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = transformer.init(spec, init_key)
    zeros = jax.tree.map(jnp.zeros_like, params) if directed else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transform.init(params),
        reference_gradient=zeros,
        proxy_gradient=zeros,
        key=run_key,
    )
