"""The forward pass counted by hand: what an accelerator executes, not what the loss needs."""

from opus_jax.models.parameter_subset import moving_layers
from opus_jax.models.presets import ModelSpec
from opus_jax.models.thin import pays


def forward_flops(spec: ModelSpec, tokens_per_row: int) -> int:
    """Floating-point operations of one row's forward pass, a multiply and an add counted as two.

    Matrix products, the whole T x T attention (the causal half is computed and masked) and the head. Norms,
    elementwise work, softmax and table look-ups are left out; recomputation by remat is not part of a forward pass.
    """
    return spec.layers * _block_flops(spec, tokens_per_row) + _head_flops(spec, tokens_per_row)


def moving_flops(spec: ModelSpec, tokens_per_row: int, subset: str) -> int:
    """The part of `forward_flops` whose products carry tangents when only a `parameter_subset` moves.

    Scoring a row by forward mode costs `forward_flops + 2 * moving_flops`: a product of two moving factors has two
    tangent products. One whose kernel is fixed has one and counts half: the head, unless all parameters move or it
    is untied and moves with the top blocks.
    """
    if subset == "all":
        return forward_flops(spec, tokens_per_row)
    head_moves = subset != "blocks" and not spec.tied
    head = _head_flops(spec, tokens_per_row) // (1 if head_moves else 2)
    return moving_layers(spec.layers, subset) * _block_flops(spec, tokens_per_row) + head


def difference_flops(spec: ModelSpec, tokens_per_row: int, subset: str) -> int:
    """Scoring a row by central differences when only a `parameter_subset` moves: two passes, of which the blocks below
    the moving ones are one and the same, and compiled once."""
    moving = moving_layers(spec.layers, subset) * _block_flops(spec, tokens_per_row)
    return forward_flops(spec, tokens_per_row) + moving + _head_flops(spec, tokens_per_row)


def low_rank_flops(spec: ModelSpec, tokens_per_row: int, subset: str, rank: int) -> int:
    """Scoring a row by forward mode along a direction whose moving matrices have this rank, where that saves anything:
    of a product's two tangents, the one along the direction is two thin products."""
    whole = forward_flops(spec, tokens_per_row) + 2 * moving_flops(spec, tokens_per_row, subset)
    saved = sum(a * b - rank * (a + b) for a, b in moving_maps(spec, subset) if pays((a, b), rank))
    return whole - 2 * tokens_per_row * saved


def moving_maps(spec: ModelSpec, subset: str) -> list[tuple[int, int]]:
    """(in, out) of every matrix that moves; an embedding that is also the head is none."""
    head = [(spec.width, spec.vocab_size)] if subset != "blocks" and not spec.tied else []
    return moving_layers(spec.layers, subset) * _block_maps(spec) + head


def _block_flops(spec: ModelSpec, tokens: int) -> int:
    maps = sum(a * b for a, b in _block_maps(spec))
    attention = 2 * tokens * spec.heads * spec.head_dim
    return 2 * tokens * (maps + attention)


def _block_maps(spec: ModelSpec) -> list[tuple[int, int]]:
    """(in, out) of the matrices of a block: queries, keys, values, output, and those of the MLP."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    wide = [(spec.width, spec.hidden)] * (2 if spec.activation == "swiglu" else 1)
    return [(spec.width, queries), *[(spec.width, keys)] * 2, (queries, spec.width), *wide, (spec.hidden, spec.width)]


def _head_flops(spec: ModelSpec, tokens: int) -> int:
    return 2 * tokens * spec.width * spec.vocab_size
