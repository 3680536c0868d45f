"""Stacks of matrices dealt over a mesh: every matrix whole on one device, so that products of it need no collective.

A matrix split over devices needs one for each of the fifteen products of an orthogonalisation. Dealing the layers of a
stack moves every number once there and once back, and splits the products' work over the devices as well.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from opus_jax.distributed.axes import LogicalAxes, constrain, split_ways

Stack = Float[Array, "L rows columns"]

_DEALT: LogicalAxes = ("dealt_layer", None, None)


def on_whole_matrices(function: Callable[[Stack], Stack], stack: Stack, axes: LogicalAxes) -> Stack:
    """`function(stack)` for a function that treats the matrices of a stack independently, of the same shapes.

    Args:
      function: is given ceil(L / devices) devices layers; those beyond L are matrices of ones.
      axes: logical names of the stack's dimensions, as it lies and as the result will lie.
    """
    layers = stack.shape[0]
    missing = -layers % split_ways("dealt_layer")
    padded = jnp.pad(stack, ((0, missing), (0, 0), (0, 0)), constant_values=1)
    moved = function(_through(padded, (axes, _halfway(axes), _DEALT)))
    return _through(moved, (_DEALT, _halfway(axes), axes))[:layers]


def _halfway(axes: LogicalAxes) -> LogicalAxes:
    """One mesh axis moves at a time, each an exchange among its devices; of both at once XLA makes a gather."""
    return ("half_dealt_layer", *(None if name == "embed" else name for name in axes[1:]))


def _through(stack: Stack, stations: tuple[LogicalAxes, ...]) -> Stack:
    for axes in stations:
        stack = constrain(stack, axes)
    return stack
