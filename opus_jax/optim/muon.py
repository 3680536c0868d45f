"""Muon's momentum and orthogonalisation, on whole matrices wherever they lie, with a derivative at zero if wanted."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree
from optax import contrib

from opus_jax.distributed.axes import LogicalAxes
from opus_jax.optim.dealt import on_whole_matrices
from opus_jax.optim.guarded import TINY

Path = tuple[Any, ...]  # of a leaf, as `jax.tree_util` gives it
Matrices = Float[Array, "L rows columns"]


def scale_by_muon(
    *, beta: float, mu_dtype: Any, axes: Mapping[Path, LogicalAxes], guarded: bool = False
) -> optax.GradientTransformation:
    """`optax.contrib.scale_by_muon` (Nesterov) of stacked matrices [L, in, out], with its state.

    Args:
      beta: of the momentum.
      mu_dtype: its type.
      axes: logical names of the dimensions of the leaf at each path; a stack without names is left as it lies.
      guarded: the derivative at a zero matrix is zero. Newton-Schulz is scale-invariant: at zero its derivative is
        unbounded in every direction, so no finite value there says anything about a finite gradient.
    """
    original = contrib.scale_by_muon(beta=beta, mu_dtype=mu_dtype, weight_dimension_numbers=layer_matrices)

    def update(
        updates: optax.Updates, state: contrib.MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, contrib.MuonState]:
        count, mu = state.count + 1, optax.tree.update_moment(updates, state.mu, beta, 1)
        ahead = optax.tree.bias_correction(mu, beta, count + 1)
        fresh = optax.tree.bias_correction(updates, beta, count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, fresh)

        def step(matrices: Matrices) -> Matrices:
            return (_guarded_orthogonal if guarded else _orthogonal)(matrices, state)

        def of_leaf(path: Path, matrices: Matrices) -> Matrices:
            return on_whole_matrices(step, matrices, axes[path]) if path in axes else step(matrices)

        steps = jax.tree_util.tree_map_with_path(of_leaf, momentum)
        return steps, contrib.MuonState(count, optax.tree.cast(mu, mu_dtype), state.ns_coeffs)

    return optax.GradientTransformation(original.init, update)


def layer_matrices(kernels: PyTree[Any]) -> PyTree[contrib.MuonDimensionNumbers]:
    """[L, in, out]: axis 1 is reduced, axis 2 is the output, and every layer is a matrix of its own."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(1, 2), kernels)


def _orthogonal(matrices: Matrices, state: contrib.MuonState) -> Matrices:
    """Newton-Schulz; without momentum the original does nothing else."""
    alone = contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=layer_matrices)
    empty = contrib.MuonState(state.count, jnp.zeros_like(matrices), state.ns_coeffs)
    return alone.update(matrices, empty)[0]


def _guarded_orthogonal(matrices: Matrices, state: contrib.MuonState) -> Matrices:
    zero = _is_zero(matrices)
    return jnp.where(zero, 0.0, _orthogonal(jnp.where(zero, 1.0, matrices), state))


def _is_zero(matrices: Matrices) -> Bool[Array, "L 1 1"]:
    return jnp.sum(jnp.square(matrices), axis=(-2, -1), keepdims=True) <= TINY
