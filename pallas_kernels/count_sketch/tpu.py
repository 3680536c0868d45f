"""CountSketch on TPU: each tile is read once, signed and folded in VMEM."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from opus_jax.errors import UserError
from pallas_kernels.count_sketch import tiles
from pallas_kernels.count_sketch.folding import fold, shift
from pallas_kernels.count_sketch.reference import First
from pallas_kernels.generations import LIMITS, generation_in_use

BLOCK_ENTRIES = 2**18  # of one block, all its examples together: 1 MiB of float32
MOST_COLUMNS, MOST_EXAMPLES = 1024, 8


def stride_sketch(
    x: Float[Array, "N D F"],
    seed: UInt32[Array, ""],
    rows: int,
    columns: int,
    first: First = (0, 0),
    *,
    interpret: Any = False,
) -> Float[Array, "N rows columns"]:
    """As `reference.stride_sketch`.

    Raises:
      UserError: x is neither bfloat16 nor float32.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"count_sketch: the TPU kernel takes bfloat16 or float32, not {x.dtype}; use 'xla'")
    out = tiles.kernel_fold(x.shape[1], x.shape[2], rows, columns)
    folded = _call(x, tiles.kernel_scalars(seed, first), out, interpret)
    return shift(fold(folded, rows, columns), first)


def _call(x: Array, scalars: Array, out: tuple[int, int], interpret: Any) -> Array:
    block = block_shape(x.shape, out)
    grid = tuple(-(-size // part) for size, part in zip(x.shape, block, strict=True))

    def count_sketch_kernel(scalars: Any, x_ref: Any, out_ref: Any, sign_ref: Any) -> None:
        _program(scalars, x_ref, out_ref, sign_ref, (x.shape[1], x.shape[2]))

    return pl.pallas_call(
        count_sketch_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[pl.BlockSpec(block, lambda n, d, f, s: (n, d, f))],
            out_specs=pl.BlockSpec((block[0], *out), lambda n, d, f, s: (n, 0, 0)),
            scratch_shapes=[pltpu.VMEM(block[1:], jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], *out), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=LIMITS[generation_in_use()].vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x.size,
            bytes_accessed=x.size * x.dtype.itemsize + x.shape[0] * math.prod(out) * 4,
            transcendentals=0,
        ),
        interpret=interpret,
        name="count_sketch",
    )(scalars, x)


def block_shape(shape: tuple[int, ...], out: tuple[int, int]) -> tuple[int, int, int]:
    """Examples, rows and columns of one program: whole registers, rows in steps that the fold divides if it can."""
    n, d, f = shape
    columns = min(MOST_COLUMNS, tiles.whole_registers(f, tiles.LANES))
    most = max(BLOCK_ENTRIES // columns, tiles.SUBLANES)
    rows = most // out[0] * out[0] or most // tiles.SUBLANES * tiles.SUBLANES
    rows = min(rows, tiles.whole_registers(d, tiles.SUBLANES))
    return max(1, min(n, MOST_EXAMPLES, BLOCK_ENTRIES // (rows * columns))), rows, columns


def _program(scalars: Any, x_ref: Any, out_ref: Any, sign_ref: Any, limits: tuple[int, int]) -> None:
    shape = x_ref.shape[1:]
    corner = (pl.program_id(1) * shape[0], pl.program_id(2) * shape[1])

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _begin() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    sign_ref[...] = tiles.tile_signs(scalars, shape, *corner)
    mask = tiles.inside(shape, *corner, limits)

    def one(example: Any, _: None) -> None:
        signed = x_ref[example].astype(jnp.float32) * sign_ref[...]
        tiles.add_tile(out_ref, example, signed if mask is None else jnp.where(mask, signed, 0.0), *corner)

    jax.lax.fori_loop(0, x_ref.shape[0], one, None)
