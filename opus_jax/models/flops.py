"""The forward pass counted by hand: what an accelerator executes, not what the loss needs."""

from opus_jax.models.presets import ModelSpec


def forward_flops(spec: ModelSpec, tokens_per_row: int) -> int:
    """Floating-point operations of one row's forward pass, a multiply and an add counted as two.

    Matrix products, the whole T x T attention (the causal half is computed and masked) and the head. Norms,
    elementwise work, softmax and table look-ups are left out; recomputation by remat is not part of a forward pass.
    """
    tokens, queries = tokens_per_row, spec.heads * spec.head_dim
    maps = spec.width * (2 * queries + 2 * spec.kv_heads * spec.head_dim)
    maps += spec.width * spec.hidden * (3 if spec.activation == "swiglu" else 2)
    attention = 2 * tokens * queries
    head = spec.width * spec.vocab_size
    return 2 * tokens * (spec.layers * (maps + attention) + head)
