"""What one program of the ghost sketch does: a tile of some examples' gradients, formed, scaled and folded."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.count_sketch.tiles import LANES, SUBLANES, add_tile, inside, tile_signs
from pallas_kernels.ghost_sketch.blocks import Blocks, Work


@dataclass(frozen=True)
class Refs:
    """The blocks of one program; what a call does not use is None."""

    scalars: Any
    inputs: Any  # [n, t, d]
    cotangents: Any  # [n, t, f]
    left: Any  # [rows, d]
    right: Any  # [f, columns]
    scale: Any  # [d, f]
    direction: Any  # [d, f]
    sketch: Any  # [n, rows, columns], kept over the tiles
    aligned: Any  # [n, 8, 128], partial sums, kept over the tiles
    gradient: Any  # [d, f], summed over token blocks
    weight: Any  # [d, f], sign * scale of the tile at hand


def program(refs: Refs, work: Work, blocks: Blocks) -> None:
    tile_d, tile_f, step = (pl.program_id(axis) for axis in (1, 2, 3))
    steps = blocks.grid(work)[3]
    corner = (tile_d * blocks.d, tile_f * blocks.f)

    @pl.when((tile_d == 0) & (tile_f == 0) & (step == 0))
    def _begin() -> None:
        refs.sketch[...] = jnp.zeros_like(refs.sketch)
        if work.aligned:
            refs.aligned[...] = jnp.zeros_like(refs.aligned)

    if not work.multiplied:

        @pl.when(step == steps - 1)
        def _weigh() -> None:
            signs = tile_signs(refs.scalars, (blocks.d, blocks.f), *corner)
            refs.weight[...] = signs * refs.scale[...] if work.scaled else signs

    if steps == 1:
        jax.lax.fori_loop(
            0, blocks.n, lambda i, _: _finish(refs, work, i, _product(refs, work, blocks, i, 0), corner), None
        )
        return
    _accumulate(refs, work, blocks, step)

    @pl.when(step == steps - 1)
    def _end() -> None:
        _finish(refs, work, 0, refs.gradient[...], corner)


def _accumulate(refs: Refs, work: Work, blocks: Blocks, step: Array) -> None:
    part = _product(refs, work, blocks, 0, step)

    @pl.when(step == 0)
    def _first() -> None:
        refs.gradient[...] = part

    @pl.when(step > 0)
    def _later() -> None:
        refs.gradient[...] += part


def _product(refs: Refs, work: Work, blocks: Blocks, example: Any, step: Any) -> Array:
    """A^T B of one example over one block of tokens, in float32."""
    a, b = refs.inputs[example], refs.cotangents[example]
    if work.t % blocks.t:  # what lies behind the last token is not zero, and may not be finite
        real = jax.lax.broadcasted_iota(jnp.int32, (blocks.t, 1), 0) + step * blocks.t < work.t
        a, b = (jnp.where(real, x.astype(jnp.float32), 0.0).astype(x.dtype) for x in (a, b))
    return _dot(a, b, ((0,), (0,)))


def _finish(refs: Refs, work: Work, example: Any, gradient: Array, corner: tuple[Array, Array]) -> None:
    """Fold the complete tile of one example's gradient. Behind the matrix's edges lies anything, also NaN."""
    mask = inside(gradient.shape, *corner, (work.d, work.f))  # type: ignore[arg-type]

    def cut(x: Array) -> Array:
        return x if mask is None else jnp.where(mask, x, 0.0)

    if work.aligned:
        refs.aligned[example] += _to_one_register(cut(gradient * refs.direction[...]))
    if not work.multiplied:
        add_tile(refs.sketch, example, cut(gradient * refs.weight[...]), *corner)
        return
    scaled = cut(gradient * refs.scale[...] if work.scaled else gradient).astype(refs.left.dtype)
    half = _dot(refs.left[...], scaled, ((1,), (0,)))
    refs.sketch[example] += _dot(half.astype(refs.right.dtype), refs.right[...], ((1,), (0,)))


def _dot(a: Array, b: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _to_one_register(tile: Array) -> Array:
    """[d, f] -> [8, 128] with the same sum."""
    rows = tile.reshape(-1, SUBLANES, tile.shape[1]).sum(axis=0)
    return sum(rows[:, k : k + LANES] for k in range(0, tile.shape[1], LANES))  # type: ignore[return-value]
