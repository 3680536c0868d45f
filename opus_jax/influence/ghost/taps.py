"""Taps on a tree of parameters, and the one backward pass that reads them all.

Matrices and tables become `Tapped`, and report what their rule says. Gains and biases become one copy for each row,
so their gradients come out row by row as they are: they are small. Leaves under "blocks" are stacked, a layer each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from opus_jax.distributed.axes import constrain
from opus_jax.errors import UserError
from opus_jax.models.tapped import Rule, Tapped
from opus_jax.optim.labels import BLOCKS

Params = PyTree[Any]
Batch = PyTree[Any]  # leaves with the rows on their first axis
Path = tuple[str, ...]
Losses = Callable[[Params, Batch], Float[Array, " N"]]


@dataclass(frozen=True)
class Matrix:
    """Where a matrix of the tree is, and its shape.

    Attributes:
      path: names down the tree.
      shape: (D, F).
      layers: L of a stack; None = a single matrix.
    """

    path: Path
    shape: tuple[int, int]
    layers: int | None

    @property
    def name(self) -> str:
        return ".".join(self.path)


Answer = Callable[[Matrix, int], tuple[Rule, PyTree[Any], PyTree[jax.ShapeDtypeStruct]]]
"""(matrix, number of rows) -> (rule, constants, the shapes of one layer's answer)."""


def observe(losses: Losses, params: Params, batch: Batch, answer: Answer) -> tuple[Float[Array, " N"], Params]:
    """Losses of all rows, and what every matrix reports of them, out of one forward and one backward pass.

    Args:
      losses: `losses(params, batch) -> [N]`, every row's loss its own; products with matrices must go through
        `opus_jax.models.tapped`.
      params: where gradients are taken.
      batch: any pytree of arrays with N first.
      answer: the rule of each matrix, its constants (stacked [L, ...] for stacked matrices), and the shapes it answers.

    Returns:
      [N], and a tree like the parameters. Matrices: the rule's answers, [N, ...], of stacks [L, N, ...]. Vectors: every
      row's own gradient, [N, d], of stacks [L, N, d].

    Raises:
      UserError: a matrix is used by something that is not tapped; it is named.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    placed = place(params, rows, answer)

    def total(taps: Params) -> tuple[Float[Array, ""], Float[Array, " N"]]:
        found = losses(_with_taps(placed, taps), batch)
        return found.sum(), found

    gradients, found = jax.grad(total, has_aux=True)(_taps(placed))
    return found, gradients


def place(params: Params, rows: int, answer: Answer) -> Params:
    """The parameters, matrices tapped and vectors copied for each of so many rows."""

    def one(path: Any, leaf: Array) -> Any:
        matrix = _matrix(_names(path), leaf)
        if matrix is None:
            *stack, width = leaf.shape
            return constrain(jnp.broadcast_to(leaf[..., None, :], (*stack, rows, width)), _axes(stack, leaf.ndim + 1))
        rule, constants, shapes = answer(matrix, rows)
        stack = [] if matrix.layers is None else [matrix.layers]
        zero = lambda s: constrain(jnp.zeros((*stack, *s.shape), s.dtype), _axes(stack, len(stack) + len(s.shape)))  # noqa: E731
        return Tapped(leaf, jax.tree.map(zero, shapes), constants, matrix.name, rule)

    return jax.tree_util.tree_map_with_path(one, params)


def rows_first(answers: PyTree[Array], path: Path) -> PyTree[Array]:
    """What a leaf reported, [N, ...]; of a stack [N, L, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), answers) if is_stacked(path) else answers


def is_stacked(path: Path) -> bool:
    """Whether the leaf holds a layer of every block."""
    return BLOCKS in path


def paths(params: Params) -> list[Path]:
    """Of all leaves, in their order."""
    return [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def leaf_at(tree: Any, path: Path) -> Any:
    """The leaf, or subtree, at a path of names."""
    for name in path:
        tree = tree[name]
    return tree


def _matrix(path: Path, leaf: Array) -> Matrix | None:
    """None for a vector."""
    stacked = is_stacked(path)
    dimensions = leaf.ndim - stacked
    if dimensions > 2:
        raise UserError(f"the ghost engine taps matrices, but {'.'.join(path)} has the shape {leaf.shape}")
    if dimensions < 2:
        return None
    return Matrix(path, (leaf.shape[-2], leaf.shape[-1]), leaf.shape[0] if stacked else None)


def _names(path: Any) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _axes(stack: list[int], dimensions: int) -> tuple[str | None, ...]:
    """Rows are split over the batch axes, after a layer axis where there is one."""
    return (*("layer",) * len(stack), "batch", *(None,) * (dimensions - len(stack) - 1))


def _is_tapped(x: Any) -> bool:
    return isinstance(x, Tapped)


def _taps(placed: Params) -> Params:
    return jax.tree.map(lambda x: x.tap if _is_tapped(x) else x, placed, is_leaf=_is_tapped)


def _with_taps(placed: Params, taps: Params) -> Params:
    put = lambda x, tap: Tapped(x.array, tap, x.constants, x.name, x.rule) if _is_tapped(x) else tap  # noqa: E731
    return jax.tree.map(put, placed, taps, is_leaf=_is_tapped)
