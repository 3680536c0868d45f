"""How a [D, F] gradient is folded into a sketch: a two-sided product, or a signed sum over buckets."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float, UInt32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KronFold:
    """out[r, p, q] = left_r^T S right_r, flattened with r first."""

    left: Float[Array, "R D p"]
    right: Float[Array, "R F q"]

    @property
    def width(self) -> int:
        return self.left.shape[0] * self.left.shape[2] * self.right.shape[2]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CountFold:
    """out[(x mod rows) * columns + (y mod columns)] += sign(x, y) S[x, y], signs as in `count_sketch`."""

    seed: UInt32[Array, ""]
    rows: int = field(metadata={"static": True})
    columns: int = field(metadata={"static": True})

    @property
    def width(self) -> int:
        return self.rows * self.columns
