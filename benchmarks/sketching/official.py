"""The per-layer scheme of the published code, for the comparison only: every gradient is formed and then scattered.

Inputs and output cotangents of every layer are kept; per layer, every example's gradient is made 32 outputs at a
time, multiplied by the preconditioner's diagonal, and added to buckets. Bucket and sign of every coordinate are drawn
independently and kept in tables, larger together than the weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from benchmarks.sketching.stack import Blocks, Stack
from opus_jax.influence.ghost.scores import Recording, scores

OUTPUTS_AT_ONCE = 32


class Table(NamedTuple):
    """What one matrix is hashed by, and D. Leaves have the layers first."""

    bucket: Int[Array, "L D F"]
    sign: Float[Array, "L D F"]
    diagonal: Float[Array, "L D F"]


def draw_tables(key: Key[Array, ""], matrices: Blocks, m: int) -> PyTree[Table]:
    """Independent uniform buckets and signs; the diagonal is any positive numbers."""
    leaves, structure = jax.tree.flatten(matrices)

    def one(leaf: Array, key: Key[Array, ""]) -> Table:
        of_bucket, of_sign, of_diagonal = jax.random.split(key, 3)
        bucket = jax.random.randint(of_bucket, leaf.shape, 0, m, jnp.int32)
        diagonal = jax.random.uniform(of_diagonal, leaf.shape, minval=0.5, maxval=2.0)
        return Table(bucket, jax.random.rademacher(of_sign, leaf.shape, jnp.float32), diagonal)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [one(*each) for each in zip(leaves, keys, strict=True)])


def official_sketches(
    stack: Stack, matrices: Blocks, fixed: Blocks, tables: PyTree[Table], m: int, inputs: Float[Array, "N T D"]
) -> Float[Array, "N S m"]:
    """Sketches of D * G_i for every layer of every matrix."""
    recording = Recording(inputs.shape[1], stack.spec.dtype)
    factors = scores(lambda p, x: stack.losses(p, fixed, x), matrices, inputs, recording=recording).factors
    is_table = lambda x: isinstance(x, Table)  # noqa: E731
    found = jax.tree.map(lambda table, kept: _by_layer(table, kept, m), tables, factors, is_leaf=is_table)
    return jnp.concatenate(jax.tree.leaves(found), axis=1)


def _by_layer(table: Table, kept: dict[str, Array], m: int) -> Float[Array, "N L m"]:
    one = lambda layer: _of_matrix(layer[0], layer[1]["inputs"], layer[1]["cotangents"], m)  # noqa: E731
    return jax.lax.map(one, (table, kept)).swapaxes(0, 1)


def _of_matrix(
    table: Table, inputs: Float[Array, "N T D"], cotangents: Float[Array, "N T F"], m: int
) -> Float[Array, "N m"]:
    rows, _, width = cotangents.shape

    def add(sketch: Float[Array, "m N"], start: Array) -> tuple[Float[Array, "m N"], None]:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, OUTPUTS_AT_ONCE, axis=-1)  # noqa: E731
        bucket, sign, diagonal = (part(x) for x in table)
        gradients = jnp.einsum("ntd,ntf->dfn", inputs, part(cotangents))
        signed = gradients * (sign * diagonal)[..., None]
        # One row of N numbers for each coordinate: several times faster here than N scatters of single numbers.
        return sketch.at[bucket.reshape(-1)].add(signed.reshape(-1, rows)), None

    starts = jnp.arange(0, width, OUTPUTS_AT_ONCE)
    return jax.lax.scan(add, jnp.zeros((m, rows), inputs.dtype), starts)[0].T
