"""The derivative of a function of the parameters along a direction, by forward mode or by central differences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float, PyTree

from opus_jax.errors import UserError

# Of the parameters' norm. On small models in float32 the error is 0.01 to 2 % of the utilities; ten times the step
# gives 0.2 to 40 % by curvature, a hundredth of it up to 3 % by rounding.
RELATIVE_STEP = 1e-3

Params = PyTree[Float[Array, "..."]]
Function = Callable[[Params, Any], Float[Array, "..."]]  # of the parameters and rows
Slope = Callable[[Any], Float[Array, "..."]]  # of rows


class NoForwardRule(TypeError):
    """A function that forward mode cannot pass, as it holds a `custom_vjp`."""


def exact_slope(function: Function, params: Params, direction: Params) -> Slope:
    """`slope(rows)`: the derivative of `function(params, rows)` along the direction by `jax.jvp`; about three forward
    passes. It raises NoForwardRule where a `custom_vjp` stands on the way of the direction."""
    tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), direction, params)

    def forward(params: Params, tangent: Params, rows: Any) -> Float[Array, "..."]:
        return _wide(jax.jvp(lambda p: function(p, rows), (params,), (tangent,))[1])

    def slope(rows: Any) -> Float[Array, "..."]:
        # JAX refuses a custom_vjp only when it lowers or runs the result: the trace is looked through, then used.
        traced = jax.make_jaxpr(forward)(params, tangent, rows)
        if _meets_custom_vjp(traced.jaxpr):
            raise NoForwardRule("forward mode cannot pass a custom_vjp")
        return core.jaxpr_as_fun(traced)(*jax.tree.leaves((params, tangent, rows)))[0]

    return slope


def difference_slope(function: Function, params: Params, direction: Params) -> Slope:
    """`slope(rows)`: (f(p + h v) - f(p - h v)) / 2h with h = 1e-3 |p| / |v|, two forward passes and nothing else.

    Norms are over all parameters, differences are taken in float32 or wider. v = 0 gives 0.

    Raises:
      UserError: parameters narrower than float32, whose rounding would swallow the step.
    """
    narrow = {str(p.dtype) for p in jax.tree.leaves(params) if jnp.finfo(p.dtype).bits < 32}
    if narrow:
        raise UserError(f"the difference form needs parameters of float32 or wider, not {', '.join(sorted(narrow))}")
    length, step = _norm(direction), RELATIVE_STEP * _norm(params)
    step = jnp.where(step > 0, step, RELATIVE_STEP)
    unit = jax.tree.map(lambda v: v / jnp.where(length > 0, length, 1), direction)
    ahead, behind = (_moved(params, unit, sign * step) for sign in (1, -1))

    def slope(rows: Any) -> Float[Array, "..."]:
        return (_wide(function(ahead, rows)) - _wide(function(behind, rows))) * (length / (2 * step))

    return slope


def _moved(params: Params, unit: Params, step: Float[Array, ""]) -> Params:
    return jax.tree.map(lambda p, u: (p + step * u).astype(p.dtype), params, unit)


def _norm(tree: Params) -> Float[Array, ""]:
    """Euclidean, of all leaves together; scaled by the largest entry so that squares neither overflow nor vanish."""
    leaves = [_wide(x) for x in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves]))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(sum(jnp.sum((x / scale) ** 2) for x in leaves))


def _meets_custom_vjp(jaxpr: core.Jaxpr) -> bool:
    """Whether forward mode left a `custom_lin`, its stand-in for the derivative of a `custom_vjp`, at any depth."""
    return any(equation.primitive.name == "custom_lin" for equation in jaxpr.eqns) or any(
        _meets_custom_vjp(inner) for inner in core.subjaxprs(jaxpr)
    )


def _wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
