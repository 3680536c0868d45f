"""The ghost sketch on TPU: tiles of A_i^T B_i are formed, scaled and folded in VMEM and never stored."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from opus_jax.errors import UserError
from pallas_kernels.count_sketch.folding import fold as fold_buckets
from pallas_kernels.count_sketch.folding import shift
from pallas_kernels.count_sketch.reference import First
from pallas_kernels.count_sketch.tiles import LANES, SUBLANES, kernel_fold, kernel_scalars, whole_registers
from pallas_kernels.ghost_sketch.blocks import Blocks, Work, choose_blocks, cost
from pallas_kernels.ghost_sketch.fold import CountFold, KronFold
from pallas_kernels.ghost_sketch.kernel import Refs, program

FACTOR_ROWS = 16  # sublanes of a bfloat16 register


def ghost_sketch(
    inputs: Float[Array, "N T D"],
    cotangents: Float[Array, "N T F"],
    fold: KronFold | CountFold,
    scale: Float[Array, "D F"] | None,
    direction: Float[Array, "D F"] | None,
    first: First = (0, 0),
    *,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "N M"], Float[Array, " N"] | None]:
    """As `reference.ghost_sketch`; `blocks` replaces the table's choice.

    The grid is (examples, D, F, tokens): a tile of G is complete, over all tokens, before it is folded, and an
    example's sketch stays in VMEM until all its tiles are. With bfloat16 inputs a Kron fold multiplies the scaled
    tile in bfloat16 too (sums in float32); a count fold and the inner product are float32 throughout.

    Raises:
      UserError: the inputs are neither bfloat16 nor float32.
    """
    if inputs.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"ghost_sketch: the TPU kernel takes bfloat16 or float32, not {inputs.dtype}; use 'xla'")
    work = work_of(inputs, cotangents, fold, scale is not None, direction is not None)
    blocks = blocks or choose_blocks(work)
    operands = _operands(inputs, cotangents, fold, scale, direction, work, blocks)
    sketch, aligned = _call(operands, kernel_scalars(_seed(fold), first), work, blocks, interpret)
    return _unpacked(sketch, fold, first), None if aligned is None else aligned.sum(axis=(1, 2))


def work_of(inputs: Any, cotangents: Any, fold: KronFold | CountFold, scaled: bool, aligned: bool) -> Work:
    """The sizes of a call, from arrays or their shapes."""
    n, t, d = inputs.shape
    f = cotangents.shape[2]
    if isinstance(fold, CountFold):
        sketch = kernel_fold(d, f, fold.rows, fold.columns)
    else:
        blocks, _, p = fold.left.shape
        sketch = whole_registers(blocks * p, FACTOR_ROWS), whole_registers(blocks * fold.right.shape[2], LANES)
    return Work(n, t, d, f, inputs.dtype.itemsize, sketch, isinstance(fold, KronFold), scaled, aligned)


def _call(
    operands: dict[str, tuple[Array, pl.BlockSpec]], scalars: Array, work: Work, blocks: Blocks, interpret: Any
) -> tuple[Array, Array | None]:
    outputs = {"sketch": work.sketch} | ({"aligned": (SUBLANES, LANES)} if work.aligned else {})
    scratch = ({} if work.multiplied else {"weight": None}) | ({"gradient": None} if blocks.t < work.t else {})
    names = ("scalars", *operands, *outputs, *scratch)
    absent = dict.fromkeys(Refs.__dataclass_fields__)

    def ghost_sketch_kernel(*refs: Any) -> None:
        program(Refs(**absent | dict(zip(names, refs, strict=True))), work, blocks)

    results = pl.pallas_call(
        ghost_sketch_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=blocks.grid(work),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=[pl.BlockSpec((blocks.n, *s), lambda n, d, f, t, scalars: (n, 0, 0)) for s in outputs.values()],
            scratch_shapes=[pltpu.VMEM((blocks.d, blocks.f), jnp.float32) for _ in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct((work.n, *shape), jnp.float32) for shape in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem_limit,
        ),
        cost_estimate=cost(work, blocks),
        interpret=interpret,
        name="ghost_sketch",
    )(scalars, *(array for array, _ in operands.values()))
    return results[0], results[1] if work.aligned else None


def _operands(
    inputs: Array,
    cotangents: Array,
    fold: KronFold | CountFold,
    scale: Array | None,
    direction: Array | None,
    work: Work,
    blocks: Blocks,
) -> dict[str, tuple[Array, pl.BlockSpec]]:
    """Arrays and their blocks, by the names in `Refs`."""
    operands = {
        "inputs": (inputs, pl.BlockSpec((blocks.n, blocks.t, blocks.d), lambda n, d, f, t, s: (n, t, d))),
        "cotangents": (cotangents, pl.BlockSpec((blocks.n, blocks.t, blocks.f), lambda n, d, f, t, s: (n, t, f))),
    }
    if isinstance(fold, KronFold):
        left = _factor(fold.left, work.sketch[0], blocks.d, inputs.dtype).T
        right = _factor(fold.right, work.sketch[1], blocks.f, inputs.dtype)
        operands["left"] = (left, pl.BlockSpec((work.sketch[0], blocks.d), lambda n, d, f, t, s: (0, d)))
        operands["right"] = (right, pl.BlockSpec((blocks.f, work.sketch[1]), lambda n, d, f, t, s: (f, 0)))
    for name, array in (("scale", scale), ("direction", direction)):
        if array is not None:
            tile = pl.BlockSpec((blocks.d, blocks.f), lambda n, d, f, t, s: (d, f))
            operands[name] = (array.astype(jnp.float32), tile)
    return operands


def _factor(factor: Float[Array, "R D p"], width: int, block: int, dtype: Any) -> Float[Array, "E width"]:
    """All blocks' columns side by side, zero where they are filled up: a product with all is one product."""
    r, d, p = factor.shape
    flat = factor.transpose(1, 0, 2).reshape(d, r * p)
    return jnp.pad(flat, ((0, -d % block), (0, width - r * p))).astype(dtype)


def _unpacked(sketch: Array, fold: KronFold | CountFold, first: First) -> Float[Array, "N M"]:
    if isinstance(fold, CountFold):
        folded = shift(fold_buckets(sketch, fold.rows, fold.columns), first)
        return folded.reshape(sketch.shape[0], -1)
    r, _, p = fold.left.shape
    q = fold.right.shape[2]
    blocks = [sketch[:, i * p : (i + 1) * p, i * q : (i + 1) * q] for i in range(r)]
    return jnp.stack(blocks, axis=1).reshape(sketch.shape[0], -1)


def _seed(fold: KronFold | CountFold) -> Array:
    return fold.seed if isinstance(fold, CountFold) else jnp.uint32(0)
