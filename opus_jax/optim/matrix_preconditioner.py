"""The frozen preconditioner P of one weight matrix, in the forms that a sketch can take apart.

What matters to a sketch of P (sum_t a_t b_t^T) is whether P acts on the factors: P (a b^T) = a' b'^T costs nothing and
the gradient is never formed; an elementwise P with no such structure needs the gradient's tiles.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from opus_jax.errors import UserError
from opus_jax.optim.frozen import adam_parts, muon_output_sides
from opus_jax.optim.labels import BLOCKS
from opus_jax.optim.optimizers import AnyOptimizer, Optimizer

FORMS = ("identity", "exact", "factored")
ROOT_STEPS = 16  # the bound on the largest eigenvalue is loose by up to sqrt(F), a few steps' worth

Gradient = Float[Array, "*L D F"]
AnyGradient = Float[Array, "..."]  # of a matrix or a vector
Inputs = Float[Array, "N T D"]
Cotangents = Float[Array, "N T F"]
Ids = Int[Array, "N T"]

# Leaves of the classes are declared Any: a tree of the same form holds shapes, shardings or scan's axes.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity:
    """P G = G."""

    def apply(self, gradient: AnyGradient) -> AnyGradient:
        return gradient

    def of_factors(self, inputs: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
        return inputs, cotangents

    def of_rows(self, ids: Ids, cotangents: Cotangents) -> Cotangents:
        return cotangents

    def at_rows(self, start: int, stop: int) -> "Identity":
        return self

    def root(self) -> "Identity":
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagonal:
    """P G = scale * G, elementwise; does not act on factors.

    Attributes:
      scale: [.., D, F].
    """

    scale: Any

    def apply(self, gradient: AnyGradient) -> AnyGradient:
        return (self.scale * gradient).astype(gradient.dtype)

    def of_rows(self, ids: Ids, cotangents: Cotangents) -> Cotangents:
        """b' of P (e_id b^T) = e_id b'^T, with e_id the unit vector of row id."""
        return (self.scale[ids] * cotangents).astype(cotangents.dtype)

    def at_rows(self, start: int, stop: int) -> "Diagonal":
        """P of rows start to stop of the gradient."""
        return Diagonal(self.scale[..., start:stop, :])

    def root(self) -> "Diagonal":
        return Diagonal(jnp.sqrt(self.scale))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored:
    """P G = diag(rows) G diag(columns).

    Attributes:
      rows: [.., D].
      columns: [.., F].
    """

    rows: Any
    columns: Any

    def apply(self, gradient: Gradient) -> Gradient:
        return (self.rows[..., :, None] * self.columns[..., None, :] * gradient).astype(gradient.dtype)

    def of_factors(self, inputs: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
        """(a', b') of P (a b^T) = a' b'^T, in the types they came in."""
        return (self.rows * inputs).astype(inputs.dtype), (self.columns * cotangents).astype(cotangents.dtype)

    def of_rows(self, ids: Ids, cotangents: Cotangents) -> Cotangents:
        return (self.rows[ids][..., None] * self.columns * cotangents).astype(cotangents.dtype)

    def at_rows(self, start: int, stop: int) -> "Factored":
        return Factored(self.rows[..., start:stop], self.columns)

    def root(self) -> "Factored":
        return Factored(jnp.sqrt(self.rows), jnp.sqrt(self.columns))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputSide:
    """P G = G matrix.

    Attributes:
      matrix: [.., F, F].
    """

    matrix: Any

    def apply(self, gradient: Gradient) -> Gradient:
        return (gradient @ self.matrix).astype(gradient.dtype)

    def of_factors(self, inputs: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
        return inputs, self._turned(cotangents)

    def of_rows(self, ids: Ids, cotangents: Cotangents) -> Cotangents:
        return self._turned(cotangents)

    def at_rows(self, start: int, stop: int) -> "OutputSide":
        return self

    def root(self) -> "OutputSide":
        return OutputSide(_square_root(self.matrix))

    def _turned(self, cotangents: Cotangents) -> Cotangents:
        wide = jnp.promote_types(cotangents.dtype, jnp.float32)
        return jnp.dot(cotangents, self.matrix.astype(cotangents.dtype), preferred_element_type=wide).astype(
            cotangents.dtype
        )


MatrixPreconditioner = Identity | Diagonal | Factored | OutputSide


def matrix_preconditioners(
    optimizer: AnyOptimizer, opt_state: Any, params: PyTree[Float[Array, "..."]], form: str
) -> PyTree[MatrixPreconditioner]:
    """P of every matrix and vector, the learning rate inside once, as in `frozen_product`.

    Args:
      optimizer: made by `make_optimizer`; with form 'identity' any will do.
      opt_state: its state before the step.
      params: parameters; leaves under 'blocks' are stacked [L, ...], and so are all leaves of their P.
      form: 'identity'; 'exact', AdamW's diagonal and Muon's S, applying which is `frozen_product`; 'factored', Muon's
        S, and AdamW's diagonal with the second moments replaced by their rank-1 fit, the product of their row and
        column means over the mean of all (Adafactor, arXiv 1804.04235).

    Returns:
      Tree like the parameters. Gains and biases get AdamW's diagonal in both forms, a scale of their own shape.

    Raises:
      UserError: the form is unknown, or the optimizer was not made here.
    """
    if form not in FORMS:
        raise UserError(f"form of the preconditioner = {form!r}: must be one of {', '.join(FORMS)}")
    if form == "identity":
        return identities(params)
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"form of the preconditioner = {form!r} needs an optimizer from make_optimizer; use 'identity'")
    factor, denominators = adam_parts(optimizer, opt_state, params)

    def one(path: tuple[Any, ...], leaf: Array, denominator: Array | None, side: Array | None) -> MatrixPreconditioner:
        if denominator is None:
            return OutputSide(side)
        is_matrix = leaf.ndim - is_stacked(path) >= 2
        return _rank_one(factor, denominator) if form == "factored" and is_matrix else Diagonal(factor / denominator)

    sides = muon_output_sides(optimizer, opt_state, params)
    return jax.tree_util.tree_map_with_path(one, params, denominators, sides)


def identities(params: PyTree[Array]) -> PyTree[Identity]:
    """No preconditioner, for every leaf."""
    return jax.tree.map(lambda _: Identity(), params)


def roots(preconditioners: PyTree[MatrixPreconditioner]) -> PyTree[MatrixPreconditioner]:
    """R with R R = P for each: <P x, y> = <R x, R y>, so one sketch of R g gives the products in P's metric."""
    return jax.tree.map(lambda p: p.root(), preconditioners, is_leaf=_is_preconditioner)


def apply_tree(preconditioners: PyTree[MatrixPreconditioner], gradients: PyTree[Array]) -> PyTree[Array]:
    """P of every leaf times that leaf; leading axes of gradients, such as examples, are kept."""
    return jax.tree.map(lambda p, g: p.apply(g), preconditioners, gradients, is_leaf=_is_preconditioner)


def _is_preconditioner(x: Any) -> bool:
    return isinstance(x, Identity | Diagonal | Factored | OutputSide)


def _square_root(matrix: Float[Array, "*L F F"]) -> Float[Array, "*L F F"]:
    """Of a symmetric positive matrix, by coupled Newton-Schulz steps (Higham, Functions of Matrices, 6.35).

    Muon's S has eigenvalues between 0.69 and 3.45 times its factor, so the steps reach rounding.
    """
    bound = jnp.max(jnp.sum(jnp.abs(matrix), axis=-1), axis=-1)[..., None, None]  # at least the largest eigenvalue
    safe = jnp.where(bound > 0, bound, 1)
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def step(_: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        root, inverse = pair
        turn = (3 * identity - jnp.matmul(inverse, root, precision="highest")) / 2
        return jnp.matmul(root, turn, precision="highest"), jnp.matmul(turn, inverse, precision="highest")

    start = matrix / safe, jnp.broadcast_to(identity, matrix.shape)
    return jnp.sqrt(bound) * jax.lax.fori_loop(0, ROOT_STEPS, step, start)[0]


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at a path of the parameter tree holds one array for each layer, on its first axis."""
    return BLOCKS in [jax.tree_util.keystr((key,), simple=True) for key in path]


def _rank_one(factor: Float[Array, ""], denominator: Float[Array, "*L D F"]) -> Factored:
    """factor / denominator, the denominator's squares (the second moments) being fitted by their means."""
    square = jnp.square(denominator)
    rows, columns = square.mean(axis=-1), square.mean(axis=-2)
    whole = rows.mean(axis=-1, keepdims=True)
    return Factored(factor * jnp.sqrt(whole / rows), 1 / jnp.sqrt(columns))
