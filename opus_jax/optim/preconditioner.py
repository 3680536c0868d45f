"""The direction v along which a candidate's gradient is worth something: v = -(d update / d gradient)^T g_proxy.

An optimizer adds update(g) to the parameters, g being the mean gradient of the batch. Putting a little of example i
into the batch changes the proxy loss by <g_proxy, J grad_i>, J = d update / d gradient, so the example's utility is
-<g_proxy, J grad_i> = <grad_i, v> (arXiv 2602.05400 eq. 14-23, without its frozen linearisation). Higher is better.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.errors import UserError
from opus_jax.optim.frozen import frozen_product
from opus_jax.optim.moments import find_states
from opus_jax.optim.optimizers import AnyOptimizer, Optimizer

Tree = PyTree[Float[Array, "..."]]


def direction(
    optimizer: AnyOptimizer, opt_state: Any, params: Tree, grad_reference: Tree, grad_proxy: Tree, mode: str = "vjp"
) -> Tree:
    """Direction v; see `direction_with_report`, which also counts what was not finite."""
    return direction_with_report(optimizer, opt_state, params, grad_reference, grad_proxy, mode)[0]


def direction_with_report(
    optimizer: AnyOptimizer, opt_state: Any, params: Tree, grad_reference: Tree, grad_proxy: Tree, mode: str = "vjp"
) -> tuple[Tree, Int[Array, ""]]:
    """Direction v = -(d update / d gradient)^T g_proxy, learning rate included, and how many entries were not finite.

    Args:
      optimizer: an `Optimizer` (its twin is differentiated), any optax transformation, or an `optax.MultiSteps`, which
        is differentiated at its emitting mini-step, with respect to the mean accumulated gradient.
      opt_state: its state before the step.
      params: parameters, any pytree.
      grad_reference: where the update is linearised: the previous step's mean update-batch gradient, before clipping.
        Clipping and Newton-Schulz are scale-invariant, so the component of g_proxy along the reference is removed by
        them: at g_proxy itself little is left, and at zero there is no derivative.
      grad_proxy: gradient of the proxy loss.
      mode: 'vjp', the exact derivative; 'adamw_frozen', the diagonal 1 / (sqrt(nu_hat) + eps) of the past (eq. 12-13);
        'muon_frozen', one Newton-Schulz step frozen at the momentum (eq. 5-7), AdamW's diagonal on the other leaves;
        'identity', v = g_proxy.

    Returns:
      v, a tree like the parameters, with entries that were not finite set to 0; and their number, int32.

    Raises:
      UserError: the mode is unknown or does not fit the optimizer.
    """
    modes: dict[str, Callable[[], Tree]] = {
        "vjp": lambda: _vjp(optimizer, opt_state, params, grad_reference, grad_proxy),
        "adamw_frozen": lambda: frozen_product(_made_here(optimizer, "adamw"), opt_state, params, grad_proxy),
        "muon_frozen": lambda: frozen_product(_made_here(optimizer, "muon"), opt_state, params, grad_proxy),
        "identity": lambda: grad_proxy,
    }
    if mode not in modes:
        raise UserError(f"selection.direction = {mode!r}: must be one of {', '.join(modes)}")
    return _finite(modes[mode]())


def _made_here(optimizer: AnyOptimizer, name: str) -> Optimizer:
    if not isinstance(optimizer, Optimizer) or optimizer.config.name != name:
        raise UserError(
            f"selection.direction = {name}_frozen needs optimizer.name = {name} from make_optimizer; use vjp"
        )
    return optimizer


def _vjp(optimizer: AnyOptimizer, opt_state: Any, params: Tree, grad_reference: Tree, grad_proxy: Tree) -> Tree:
    transform, state = _emitting(optimizer, opt_state)
    _, pull = jax.vjp(lambda gradient: transform.update(gradient, state, params)[0], grad_reference)
    (product,) = pull(grad_proxy)
    return jax.tree.map(jnp.negative, product)


def _emitting(optimizer: AnyOptimizer, opt_state: Any) -> tuple[Any, Any]:
    """The transformation and state that turn a step's mean gradient into an update."""
    if isinstance(optimizer, Optimizer):
        return optimizer.twin, opt_state
    if isinstance(opt_state, optax.MultiStepsState):
        # `gradient_transformation()` is a pair of the accumulator's bound methods.
        accumulator = optimizer if isinstance(optimizer, optax.MultiSteps) else optimizer.update.__self__
        return _emitting(accumulator.inner_opt, opt_state.inner_opt_state)
    if find_states(opt_state, optax.MultiStepsState):
        raise UserError("optax.MultiSteps lies inside another transformation: make it the outermost one")
    return optimizer, opt_state


def _finite(tree: Tree) -> tuple[Tree, Int[Array, ""]]:
    bad = jax.tree.map(lambda x: ~jnp.isfinite(x), tree)
    count = sum((jnp.sum(b, dtype=jnp.int32) for b in jax.tree.leaves(bad)), jnp.zeros((), jnp.int32))
    return jax.tree.map(lambda x, b: jnp.where(b, 0, x), tree, bad), count
