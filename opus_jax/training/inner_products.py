"""Utilities and inner products of all candidates, by the engine and the sketch of the configuration.

Redundancy, GREATS and the paper's rule need what candidates have in common. Engine `ghost` finds it in one backward
pass; `per_example` forms every gradient, and is the plain reading of the method, against which the others are checked.
Products are in the metric of the frozen preconditioner P, read from the optimizer's state: <P g_i, g_j> =
<R g_i, R g_j> with R R = P, so one sketch of R g gives them, and where the direction is P g_proxy the utilities too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array, Float, PyTree, UInt32

from opus_jax.config import SelectionConfig
from opus_jax.distributed.axes import RULES
from opus_jax.influence.chunks import map_chunks
from opus_jax.influence.ghost.scores import Axes, Pairing, Recording, Scores, Sketching, scores
from opus_jax.influence.gram import gram_of_sketches, inner_products
from opus_jax.influence.per_example import along, per_example_gradients
from opus_jax.influence.sketch import CountSketch, Sketch, make_sketch, sketch_tree
from opus_jax.models import transformer
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.matrix_preconditioner import apply_tree, identities, is_stacked, roots
from opus_jax.selection import paper

Batch = dict[str, Any]
Gradient = PyTree[Float[Array, "..."]]
Preconditioners = PyTree[Any]


@dataclass(frozen=True)
class InnerProducts:
    """Whom to ask, and how.

    Attributes:
      settings: engine, sketch and kernel.
      losses: `losses(params, rows) -> [N]`.
      params: where gradients are taken: the model's parameters, or a part of them.
      rows: the candidates, cut as they are scored.
      seed: of the hashes.
      frozen: makes P of every leaf of `params`; called only where it is needed.
      axes: see `ghost.scores.Sketching`.
      recording: also keep what the update needs (`selection.shared`).
    """

    settings: SelectionConfig
    losses: Callable[[Any, Batch], Float[Array, " N"]]
    params: Any
    rows: Batch
    seed: UInt32[Array, ""]
    frozen: Callable[[], Preconditioners]
    axes: tuple[tuple[str, Axes], ...] = ()
    recording: Recording | None = None

    def opus(self, v: Gradient, proxy_gradient: Gradient) -> Scores:
        """Utilities <g_i, v>, and with redundancy the Gram matrix <P g_i, g_j>."""
        settings, sketch = self.settings, self.sketch
        if settings.sketched_utilities:
            assert sketch is not None, "the configuration's checks ask for one"
            root, target = (
                (identities(self.params), v) if settings.direction == "vjp" else (self._root(), proxy_gradient)
            )
            found = self._ask(sketch=sketch, preconditioners=root)
            utilities = inner_products(found.sketches, self._sketch_of(sketch, target, root))[:, 0]
            return self._with_gram(replace(found, utilities=utilities))
        if not settings.redundancy:
            return self._ask(direction=v)
        if sketch is None:
            return self._ask(direction=v, pairs=self.frozen())
        return self._with_gram(self._ask(direction=v, sketch=sketch, preconditioners=self._root()))

    def greats(self, proxy_gradient: Gradient) -> Scores:
        """<g_i, g_proxy> and <g_i, g_j>."""
        plain = identities(self.params)
        if self.sketch is None:
            return self._ask(direction=proxy_gradient, pairs=plain)
        return self._with_gram(self._ask(direction=proxy_gradient, sketch=self.sketch, preconditioners=plain))

    def paper(self, proxy_gradient: Gradient) -> Scores:
        """The published estimates of <P g_i, g_proxy> and <P g_i, P g_j> (arXiv 2602.05400, eq. 24-25)."""
        sketch = CountSketch(paper.SKETCH)
        found = self._ask(sketch=sketch, preconditioners=self.frozen())
        proxy = self._sketch_of(sketch, proxy_gradient, identities(self.params))
        return self._with_gram(replace(found, utilities=inner_products(found.sketches, proxy)[:, 0]))

    @property
    def sketch(self) -> Sketch | None:
        settings = self.settings
        return None if settings.sketch is None else make_sketch(settings.sketch, settings.sketch_width)

    def _ask(
        self,
        *,
        direction: Gradient | None = None,
        pairs: Preconditioners | None = None,
        sketch: Sketch | None = None,
        preconditioners: Preconditioners | None = None,
    ) -> Scores:
        if self.settings.engine == "per_example":
            return self._ask_gradients(direction, sketch, preconditioners)
        sketching = None
        if sketch is not None:
            sketching = Sketching(sketch, self.seed, preconditioners, self.axes, self.settings.kernel)
        return scores(
            self.losses,
            self.params,
            self.rows,
            direction=direction,
            sketching=sketching,
            pairing=None if pairs is None else Pairing(pairs),
            recording=self.recording,
            chunk=self.settings.score_chunk,
        )

    def _ask_gradients(
        self, direction: Gradient | None, sketch: Sketch | None, preconditioners: Preconditioners | None
    ) -> Scores:
        """The same of materialised gradients, one chunk's at a time."""
        assert sketch is not None, "exact products of all gradients at once are influence/gram.py's"

        def of_chunk(rows: Batch) -> dict[str, Array]:
            gradients = per_example_gradients(self.losses, self.params, rows)
            moved = apply_tree(preconditioners, gradients)
            found = {"sketches": self._sketches(sketch, moved)}
            return found if direction is None else found | {"utilities": along(gradients, direction)}

        return Scores(losses=None, **map_chunks(of_chunk, self.rows, self.settings.score_chunk))

    def _sketch_of(self, sketch: Sketch, gradient: Gradient, preconditioners: Preconditioners) -> Float[Array, "1 S M"]:
        """The sketch of P times one gradient, under the candidates' hashes."""
        one = jax.tree.map(lambda g: g[None], gradient)
        return self._sketches(sketch, apply_tree(preconditioners, one))

    def _sketches(self, sketch: Sketch, gradients: Gradient) -> Float[Array, "N S M"]:
        return sketch_tree(sketch, gradients, self.seed, axes=self.axes, implementation=self.settings.kernel)

    def _root(self) -> Preconditioners:
        return roots(self.frozen())

    def _with_gram(self, found: Scores) -> Scores:
        return replace(found, gram=gram_of_sketches(found.sketches))


def activation_axes(spec: ModelSpec) -> tuple[tuple[str, Axes], ...]:
    """Mesh axes over which the inputs and the outputs of each matrix are split, where the mesh in use splits them.

    Activations are whole over the model's width, whose parameters may be split; heads, MLP and vocabulary are split in
    both.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shapes = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    logical = jax.tree.leaves(transformer.logical_axes(spec), is_leaf=lambda x: isinstance(x, tuple))
    found = []
    for (path, leaf), names in zip(jax.tree_util.tree_leaves_with_path(shapes), logical, strict=True):
        if leaf.ndim - is_stacked(path) < 2:
            continue
        first, second = (_axis(mesh, name, size) for name, size in zip(names[-2:], leaf.shape[-2:], strict=True))
        if first or second:
            found.append((jax.tree_util.keystr(path, simple=True, separator="."), (first, second)))
    return tuple(found)


def _axis(mesh: Any, name: str | None, size: int) -> str | None:
    axis = RULES.get(name) if name not in (None, "embed") else None
    if not isinstance(axis, str) or mesh.empty or mesh.shape[axis] == 1 or size % mesh.shape[axis]:
        return None
    return axis
