"""Utilities, sketches, inner products and factors of every row, out of one forward and one backward pass.

No weight gradient is computed: what is asked of a matrix is answered from its inputs and cotangents, and gains and
biases, being small, give every row's own gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt32

from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.ghost.inner_products import Pairs
from opus_jax.influence.ghost.rules import Alignment, Factors, Sketched, Together
from opus_jax.influence.ghost.taps import (
    Batch,
    Losses,
    Matrix,
    Params,
    Path,
    is_stacked,
    leaf_at,
    observe,
    paths,
    rows_first,
)
from opus_jax.influence.gram import inner_products
from opus_jax.influence.per_example import along
from opus_jax.influence.sketch.family import Sketch
from opus_jax.models.precision import wide
from opus_jax.models.tapped import Rule
from pallas_kernels.count_sketch.hashing import fold_seed

Axes = tuple[str | None, str | None]
Answers = PyTree[Array]


@dataclass(frozen=True)
class Sketching:
    """Sketches of P g_i.

    Attributes:
      sketch: the family, and how many numbers it keeps of each matrix.
      seed: the same seed is the same hash, at every call and for every batch.
      preconditioners: tree like the parameters, P of every leaf.
      axes: by the name of a matrix, the mesh axes over which its activations' D and F are split; absent = whole.
      implementation: of the kernels; None = by the mesh's platform.
    """

    sketch: Sketch
    seed: UInt32[Array, ""]
    preconditioners: PyTree[Any]
    axes: tuple[tuple[str, Axes], ...] = ()
    implementation: str | None = None


@dataclass(frozen=True)
class Pairing:
    """Exact inner products of all pairs, <P g_i, g_j>; with `both_sides` <P g_i, P g_j>. `preconditioners` as above.

    Every use of a matrix answers for itself, so a table that is also the head must be left out: what its two uses have
    in common would be missing. Sketches are sums over uses, and have no such limit.
    """

    preconditioners: PyTree[Any]
    both_sides: bool = False


@dataclass(frozen=True)
class Recording:
    """Factors of every matrix, for `shared.gradient_of_rows`.

    Attributes:
      tokens: T.
      dtype: of activations, in which they are kept.
      uses: by the name of a matrix, how the model uses it where that is not by products alone ('lookup', 'product').
    """

    tokens: int
    dtype: str
    uses: tuple[tuple[str, tuple[str, ...]], ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """What one pass found of N rows; None = not asked for.

    Attributes:
      losses: [N].
      utilities: <grad loss_i, v>, exact.
      sketches: [N, S, M], one for each layer of each leaf, in order.
      gram: [N, N].
      factors: like the parameters.
    """

    losses: Any
    utilities: Any = None
    sketches: Any = None
    gram: Any = None
    factors: Any = None


def scores(
    losses: Losses,
    params: Params,
    batch: Batch,
    *,
    direction: Params | None = None,
    sketching: Sketching | None = None,
    pairing: Pairing | None = None,
    recording: Recording | None = None,
    chunk: int | None = None,
) -> Scores:
    """Ask all rows' gradients g_i for what is wanted.

    Costs two forward passes for each row, a third with a direction, and what sketches and pairs cost.

    Args:
      losses: `losses(params, batch) -> [N]`, through `opus_jax.models.tapped` for every matrix.
      params: where gradients are taken: all parameters, or a part, the rest being fixed inside `losses`.
      batch: any pytree of arrays with N first.
      direction: v, a tree like the parameters.
      chunk: rows at a time; None = all. Must divide N, and is for utilities and sketches only: pairs and factors are
        of all rows at once.

    Raises:
      UserError: a matrix is used by something that is not tapped, or `chunk` does not divide N.
      ValueError: `chunk` with pairs or factors.
    """
    if chunk is not None and (pairing or recording):
        raise ValueError("chunk: pairs and factors are of all rows at once")
    wanted = _Wanted(params, direction, sketching, pairing, recording)

    def of_rows(rows: Batch) -> dict[str, Any]:
        found, answers = observe(losses, params, rows, wanted.ask)
        return {"losses": found} | wanted.read(answers)

    return Scores(**(of_rows(batch) if chunk is None else map_chunks(of_rows, batch, chunk)))


@dataclass(frozen=True)
class _Wanted:
    """The questions to every leaf, and how their answers add up."""

    params: Params
    direction: Params | None
    sketching: Sketching | None
    pairing: Pairing | None
    recording: Recording | None

    def ask(self, matrix: Matrix, rows: int) -> tuple[Rule, dict[str, Any], dict[str, Any]]:
        """Of a matrix: (rules together, their constants, shapes of their answers)."""
        kind = wide(leaf_at(self.params, matrix.path).dtype)
        asked: dict[str, tuple[Rule, Any, Any]] = {}
        if self.direction is not None:
            v = leaf_at(self.direction, matrix.path).astype(kind)
            asked["utilities"] = Alignment(), v, jax.ShapeDtypeStruct((rows,), kind)
        if self.sketching is not None:
            asked["sketches"] = self._sketched(self.sketching, matrix, rows, kind)
        if self.pairing is not None:
            preconditioner = leaf_at(self.pairing.preconditioners, matrix.path)
            asked["gram"] = Pairs(self.pairing.both_sides), preconditioner, jax.ShapeDtypeStruct((rows, rows), kind)
        if self.recording is not None:
            uses = dict(self.recording.uses).get(matrix.name, ("product",))
            factors = Factors(matrix.shape, uses, self.recording.dtype)
            asked["factors"] = factors, None, factors.answer(rows, self.recording.tokens)
        column = lambda i: {name: answer[i] for name, answer in asked.items()}  # noqa: E731
        return Together(tuple(column(0).items())), column(1), column(2)

    def read(self, answers: Answers) -> dict[str, Any]:
        """What was found, rows first; factors stay as they are."""
        parts: dict[str, Callable[[Path], Any]] = {}
        if self.direction is not None:
            parts["utilities"] = lambda path: self._utility(answers, path)
        if self.pairing is not None:
            parts["gram"] = lambda path: self._gram(answers, path)
        found: dict[str, Any] = {name: sum(map(part, paths(self.params))) for name, part in parts.items()}
        if self.sketching is not None:
            each = [self._sketch(self.sketching, answers, path) for path in paths(self.params)]
            found["sketches"] = jnp.concatenate(each, axis=1)
        if self.recording is not None:
            keep = lambda path: leaf_at(answers, path)["factors"] if self._is_matrix(path) else leaf_at(answers, path)  # noqa: E731
            structure = jax.tree.structure(self.params)
            found["factors"] = jax.tree.unflatten(structure, [keep(path) for path in paths(self.params)])
        return found

    # --------------------------------------------------------------------------------------------- leaves

    def _sketched(self, wanted: Sketching, matrix: Matrix, rows: int, kind: Any) -> tuple[Rule, Any, Any]:
        axes = dict(wanted.axes).get(matrix.name, (None, None))
        rule = Sketched(wanted.sketch, matrix.shape[0], axes, wanted.implementation)
        seeds = self._seeds(wanted, matrix.path, matrix.layers or 1)
        constants = leaf_at(wanted.preconditioners, matrix.path), seeds if matrix.layers else seeds[0]
        return rule, constants, jax.ShapeDtypeStruct((rows, wanted.sketch.width), kind)

    def _utility(self, answers: Answers, path: Path) -> Float[Array, " N"]:
        found = rows_first(leaf_at(answers, path), path)
        if self._is_matrix(path):
            return found["utilities"].reshape(found["utilities"].shape[0], -1).sum(axis=1)
        return along(found, leaf_at(self.direction, path))

    def _gram(self, answers: Answers, path: Path) -> Float[Array, "N N"]:
        assert self.pairing is not None
        found = leaf_at(answers, path)
        if self._is_matrix(path):
            return found["gram"].sum(axis=0) if is_stacked(path) else found["gram"]
        gradients = rows_first(found, path)
        moved = leaf_at(self.pairing.preconditioners, path).apply(gradients)
        return inner_products(moved, moved if self.pairing.both_sides else gradients)

    def _sketch(self, wanted: Sketching, answers: Answers, path: Path) -> Float[Array, "N S M"]:
        found = rows_first(leaf_at(answers, path), path)
        if self._is_matrix(path):
            return found["sketches"] if is_stacked(path) else found["sketches"][:, None]
        moved = leaf_at(wanted.preconditioners, path).apply(found)
        layers = moved if is_stacked(path) else moved[:, None]
        one = lambda x, seed: wanted.sketch.of_gradient(x[:, None], seed, implementation=wanted.implementation)  # noqa: E731
        seeds = self._seeds(wanted, path, layers.shape[1])
        return jax.lax.map(lambda each: one(*each), (layers.swapaxes(0, 1), seeds)).swapaxes(0, 1)

    def _seeds(self, wanted: Sketching, path: Path, layers: int) -> UInt32[Array, " L"]:
        """Those of `sketch_tree`."""
        number = paths(self.params).index(path)
        return jax.vmap(lambda layer: fold_seed(wanted.seed, number, layer))(jnp.arange(layers, dtype=jnp.uint32))

    def _is_matrix(self, path: Path) -> bool:
        return leaf_at(self.params, path).ndim - is_stacked(path) == 2
