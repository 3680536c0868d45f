"""Block sizes of the ghost sketch on TPU, and what they cost."""

import math
from dataclasses import dataclass, field

from jax.experimental import pallas as pl

from opus_jax.errors import UserError
from pallas_kernels.generations import LIMITS, MIB, Limits, generation_in_use

UNIT = 128  # lanes of a register; both sides of a tile are the lanes of one operand
ROWS = 16  # sublanes of a bfloat16 register
MOST_EXAMPLES = 8  # per program
TILE_SETUP = 128  # rows of a tile that would take as long as beginning one


@dataclass(frozen=True)
class Work:
    """One call, in sizes: what block sizes and costs depend on.

    Attributes:
      n, t, d, f: examples, tokens, rows and columns of the gradient.
      itemsize: bytes of an input number.
      sketch: rows and columns of the block that an example is folded to.
      multiplied: whether folding is two matrix products (Kron) or a signed sum (Count).
      scaled, aligned: whether a scale and a direction are read along.
    """

    n: int
    t: int
    d: int
    f: int
    itemsize: int
    sketch: tuple[int, int]
    multiplied: bool
    scaled: bool
    aligned: bool


@dataclass(frozen=True)
class Blocks:
    """Examples, tokens, rows and columns of one program; t < T goes with n = 1."""

    n: int
    t: int
    d: int
    f: int
    vmem_limit: int = field(default=LIMITS["v4"].vmem_bytes)

    def grid(self, work: Work) -> tuple[int, int, int, int]:
        pairs = zip((work.n, work.d, work.f, work.t), (self.n, self.d, self.f, self.t), strict=True)
        n, d, f, t = (-(-size // block) for size, block in pairs)
        return n, d, f, t


def choose_blocks(work: Work, generation: str | None = None, limits: Limits | None = None) -> Blocks:
    """The largest tile that the generation's table allows, cut where it pads less, then as many examples as fit.

    Raises:
      UserError: the sketch of one example does not fit into VMEM.
    """
    limits = limits or LIMITS[generation or generation_in_use()]
    for most in range(limits.tile, 0, -UNIT):
        blocks = _blocks(work, limits, most)
        if vmem_bytes(work, blocks) <= limits.vmem_bytes:
            return blocks
    rows, columns = work.sketch
    raise UserError(
        f"ghost_sketch: a sketch of {rows} x {columns} (whole registers) does not fit into the "
        f"{limits.vmem_bytes // MIB} MiB of VMEM that a kernel may use; take a narrower sketch, or 'xla'"
    )


def vmem_bytes(work: Work, blocks: Blocks) -> int:
    """VMEM of one program by count: blocks are double-buffered, and a tile has up to three more copies at work."""
    lanes = -(-work.sketch[1] // UNIT) * UNIT
    tokens = -(-blocks.t // ROWS) * ROWS
    moving = blocks.n * tokens * (blocks.d + blocks.f) * work.itemsize + blocks.n * work.sketch[0] * lanes * 4
    moving += (work.scaled + work.aligned) * blocks.d * blocks.f * 4
    if work.multiplied:
        moving += (work.sketch[0] * blocks.d + lanes * blocks.f) * work.itemsize
    return 2 * moving + 4 * blocks.d * blocks.f * 4


def cost(work: Work, blocks: Blocks) -> pl.CostEstimate:
    """Useful arithmetic (padding not counted), and bytes between HBM and VMEM, blocks read again counted again."""
    programs, tiles_d, tiles_f, steps = blocks.grid(work)
    entries = work.n * work.d * work.f
    flops = 2 * entries * work.t + entries * (work.scaled + 2 * work.aligned)
    if work.multiplied:
        flops += 2 * entries * work.sketch[0] + 2 * work.n * work.f * tiles_d * math.prod(work.sketch)
    else:
        flops += 2 * entries
    inputs = work.n * work.t * work.itemsize * (work.d * (tiles_f if steps > 1 else 1) + work.f * tiles_d)
    weights = programs * work.d * work.f * 4 * (work.scaled + work.aligned)
    sketches = work.n * math.prod(work.sketch) * 4
    return pl.CostEstimate(flops=flops, bytes_accessed=inputs + weights + sketches, transcendentals=0)


def _blocks(work: Work, limits: Limits, most: int) -> Blocks:
    d, f, t = _tile_side(work.d, most), _tile_side(work.f, most), _tokens(work.t, limits.tokens)
    n = 1
    while t == work.t and _may_double(work, limits, Blocks(2 * n, t, d, f)):
        n *= 2
    return Blocks(n, t, d, f, limits.vmem_bytes)


def _may_double(work: Work, limits: Limits, doubled: Blocks) -> bool:
    fits = vmem_bytes(work, doubled) <= limits.vmem_bytes
    shared = doubled.n * limits.cores <= work.n  # every core has a program
    return fits and shared and doubled.n <= MOST_EXAMPLES and doubled.n * doubled.t <= limits.tokens


def _tile_side(size: int, most: int) -> int:
    """The side, a multiple of 128, that covers `size` at the least cost; a tile costs its side and its setting up."""
    sides = range(UNIT, min(most, -(-size // UNIT) * UNIT) + 1, UNIT)
    return min(sides, key=lambda side: (-(-size // side) * (side + TILE_SETUP), -(-size // side) * side))


def _tokens(t: int, most: int) -> int:
    """All tokens, or equal parts of whole registers; where these do not divide, the last is masked."""
    if t <= most:
        return t
    parts = -(-t // most)
    return -(-t // (parts * ROWS)) * ROWS
