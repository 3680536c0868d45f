"""What the ghost engine and sketches cost, in FLOPs: passes, sketches of rows, and inner products of pairs.

Matrix products and Fourier transforms are counted (2.5 m log2 m for a real one of m numbers); signs, hashes, look-ups,
scatters and elementwise preconditioners are not. Muon's S and its root are, once for each step.
"""

import math
from dataclasses import dataclass

import jax

from opus_jax.config import Config
from opus_jax.influence.sketch.family import fits
from opus_jax.influence.sketch.tree import SIDE
from opus_jax.models import parameter_subset, transformer
from opus_jax.models.flops import forward_flops, moving_flops, moving_maps
from opus_jax.models.parameter_subset import moving_layers
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.matrix_preconditioner import ROOT_STEPS, is_stacked
from opus_jax.selection import paper


@dataclass(frozen=True)
class Matrix:
    """One layer's weight matrix that moves.

    Attributes:
      shape: (D, F).
      metric: its preconditioner: 'identity', 'diagonal', 'factored' or 'output' (Muon's S).
      looked_up: a table's lookup, not a product.
    """

    shape: tuple[int, int]
    metric: str
    looked_up: bool = False


@dataclass(frozen=True)
class PairCosts:
    """Of a model under a configuration whose scores go through `training.inner_products`."""

    spec: ModelSpec
    config: Config

    @property
    def family(self) -> str | None:
        """Of the sketch in use; None = exact products."""
        return "count" if self.config.selection.method == "paper" else self.config.selection.sketch

    @property
    def width(self) -> int:
        return paper.SKETCH if self.config.selection.method == "paper" else self.config.selection.sketch_width

    @property
    def gradients(self) -> bool:
        """Whether every row's gradient is formed."""
        return self.config.selection.engine == "per_example"

    def scored_row(self) -> int:
        """The pass over one candidate, and its sketch where utilities are out of it."""
        forward, moving = forward_flops(self.spec, self._tokens), moving_flops(self.spec, self._tokens, self._subset)
        if not self._utilities_sketched:
            return forward + 2 * moving
        spared = 0 if self.gradients else weight_products(self.spec, self._tokens, self._subset)
        return forward + 2 * moving - spared + self.sketch_of_row()

    def proxy(self, rows: int) -> int:
        """Sketched utilities: the proxy gradient's sketch, its products with so many rows', and Muon's S."""
        if not self._utilities_sketched:
            return 0
        return self._sketch_of_gradient() + 2 * rows * self._numbers() + self._metric_flops()

    def products(self, rows: int) -> int:
        """All pairs of so many rows, and their sketches unless utilities have paid for them."""
        if self.family is None:
            return self._exact_pairs(rows) + self._metric_flops()
        more = 0 if self._utilities_sketched else self.sketch_of_row() * rows + self._metric_flops()
        return more + 2 * rows**2 * self._numbers()

    def sketch_of_row(self) -> int:
        """One row's sketches of all matrices."""
        if self.gradients:
            return self._sketch_of_gradient()
        return sum(self._of_tokens(matrix) for matrix in self._tapped())

    # -------------------------------------------------------------------------------------------- sketches

    def _of_tokens(self, matrix: Matrix) -> int:
        (height, width), tokens = matrix.shape, self._tokens
        turn = 2 * tokens * width**2 if matrix.metric == "output" and self.family != "kron" else 0
        if matrix.looked_up:
            return turn + (0 if fits(matrix.shape, self.width) else self._of_lookup(width))
        gradient = 2 * tokens * height * width
        if fits(matrix.shape, self.width):
            return gradient + self._applied(matrix)
        if self.family == "count":
            return gradient + turn
        if self.family == "tensor":
            return turn + self._transforms(tokens)
        if matrix.metric == "diagonal":
            return gradient + self._two_sided(height, width)
        return 2 * tokens * self._blocks * SIDE * (height + width + SIDE)

    def _of_lookup(self, width: int) -> int:
        if self.family == "kron":
            return 2 * self._tokens * self._blocks * SIDE * (width + SIDE)
        return self._transforms(self._tokens) if self.family == "tensor" else 0

    def _sketch_of_gradient(self) -> int:
        """Of gradients that exist, P applied to them."""
        total = 0
        for matrix in self._leaves():
            total += self._applied(matrix)
            if fits(matrix.shape, self.width) or self.family == "count":
                continue
            total += self._two_sided(*matrix.shape) if self.family == "kron" else self._transforms(matrix.shape[0])
        return total

    def _two_sided(self, height: int, width: int) -> int:
        return 2 * self._blocks * SIDE * width * (height + SIDE)

    def _transforms(self, tokens: int) -> int:
        """Two of each token (or row of a gradient), and one back."""
        return (2 * tokens + 1) * int(2.5 * self.width * math.log2(self.width))

    @property
    def _blocks(self) -> int:
        return self.width // SIDE**2

    def _numbers(self) -> int:
        """In the sketches of one row: so many of every layer of every leaf."""
        init = lambda: transformer.init(self.spec, jax.random.key(0))  # noqa: E731
        moving = jax.eval_shape(lambda: parameter_subset.split(init(), self._subset)[0])
        leaves = jax.tree_util.tree_leaves_with_path(moving)
        return self.width * sum(leaf.shape[0] if is_stacked(path) else 1 for path, leaf in leaves)

    # ----------------------------------------------------------------------------------------- exact pairs

    def _exact_pairs(self, rows: int) -> int:
        """As `influence/ghost/inner_products.py` does them; of gradients that exist, plain products of all."""
        if self.gradients:
            return 2 * rows**2 * sum(math.prod(matrix.shape) for matrix in self._leaves())
        return sum(self._pairs_of(matrix, rows) for matrix in self._tapped())

    def _pairs_of(self, matrix: Matrix, rows: int) -> int:
        (height, width), tokens = matrix.shape, self._tokens
        turn = 2 * rows * tokens * width**2 if matrix.metric == "output" else 0
        if matrix.looked_up:
            return turn + 2 * rows**2 * tokens**2 * width
        if matrix.metric == "diagonal" or 2 * tokens**2 >= height * width:
            return rows * (self._applied(matrix) + 2 * tokens * height * width) + 2 * rows**2 * height * width
        return turn + 2 * rows**2 * tokens**2 * (height + width)

    # -------------------------------------------------------------------------------------------- matrices

    def _applied(self, matrix: Matrix) -> int:
        """P times a gradient that exists."""
        height, width = matrix.shape
        return 2 * height * width**2 if matrix.metric == "output" else 0

    def _metric_flops(self) -> int:
        """Muon's S = aI + bA + cA^2 with A = q^T q (F x F), and its root, of which sketches are taken."""
        rooted = self.config.selection.method == "opus" and self.family is not None
        steps = 3 * ROOT_STEPS if rooted else 0
        sides = [matrix.shape for matrix in self._tapped() if matrix.metric == "output"]
        return sum(2 * width**2 * height + 2 * width**3 * (1 + steps) for height, width in sides)

    def _leaves(self) -> list[Matrix]:
        """Matrices of the parameters; a tied table is one."""
        tied_product = self.spec.tied and self._subset == "all"
        tapped = self._tapped()
        return tapped[:-1] if tied_product else tapped

    def _tapped(self) -> list[Matrix]:
        """Uses of matrices: a tied table is two, its product the last."""
        in_blocks, others = self._metric(True), self._metric(False)
        maps = moving_maps(self.spec, self._subset)
        blocks = (
            len(moving_maps(self.spec, "blocks")) // self.spec.layers * moving_layers(self.spec.layers, self._subset)
        )
        found = [Matrix(shape, in_blocks if i < blocks else others) for i, shape in enumerate(maps)]
        if self._subset == "all":
            tables = [(self.spec.vocab_size, self.spec.width)]
            tables += [(self.spec.max_length, self.spec.width)] * (self.spec.positions == "learned")
            found += [Matrix(shape, others, looked_up=True) for shape in tables]
            found += [Matrix((self.spec.width, self.spec.vocab_size), others)] * self.spec.tied
        return found

    def _metric(self, in_blocks: bool) -> str:
        settings = self.config.selection
        plain = settings.method == "opus" and (
            settings.direction == "identity" or (settings.sketched_utilities and settings.direction == "vjp")
        )
        if plain or settings.method == "greats":
            return "identity"
        if in_blocks and self.config.optimizer.name == "muon":
            return "output"
        return "factored" if settings.preconditioner == "factored" else "diagonal"

    @property
    def _utilities_sketched(self) -> bool:
        settings = self.config.selection
        return settings.method == "paper" or (settings.method == "opus" and settings.sketched_utilities)

    @property
    def _subset(self) -> str:
        return self.config.selection.parameters if self.config.selection.method == "opus" else "blocks"

    @property
    def _tokens(self) -> int:
        return self.config.selection.window or self.config.corpus.row_tokens


def weight_products(spec: ModelSpec, tokens: int, subset: str) -> int:
    """The products a^T b of one row that make weight gradients, or as many with a direction."""
    maps = moving_maps(spec, subset) + [(spec.width, spec.vocab_size)] * (spec.tied and subset == "all")
    return 2 * tokens * sum(height * width for height, width in maps)
