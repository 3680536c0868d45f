"""Shapes of the ghost sketch that tests and the benchmark share."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels.ghost_sketch.blocks import Blocks


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `blocks` None = those of the table."""

    name: str
    n: int
    t: int
    d: int
    f: int
    dtype: str = "float32"
    blocks: Blocks | None = None


# Small enough for the interpreter. Between them: all sides ragged, one example, examples, tokens and both sides of the
# gradient in several blocks, the last of which is not full, and both types.
SMALL = (
    Case("attention", 3, 16, 128, 384, blocks=Blocks(2, 16, 128, 128)),
    Case("ragged", 1, 13, 72, 200),
    Case("tokens_in_parts", 2, 50, 130, 300, "bfloat16", Blocks(1, 32, 128, 128)),
)

# Real layers, at the lengths at which they are scored.
LAYERS = (
    Case("gpt2_mlp", 16, 512, 768, 3072, "bfloat16"),
    Case("gpt2_xl_mlp", 8, 512, 1600, 6400, "bfloat16"),
    Case("gpt2_xl_mlp_whole_rows", 4, 6144, 1600, 6400, "bfloat16"),
    Case("llama3_8b_mlp", 8, 512, 4096, 14336, "bfloat16"),
)


def numbers(case: Case, seed: int = 0) -> dict[str, Any]:
    """Inputs, cotangents (rounded to the case's type), scale and direction, as float64 in NumPy."""
    import jax.numpy as jnp

    random = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    tokens = {
        name: random.normal(size=(case.n, case.t, width)).astype(dtype).astype(np.float64)
        for name, width in (("inputs", case.d), ("cotangents", case.f))
    }
    weights = {"scale": random.uniform(0.1, 2, (case.d, case.f)), "direction": random.normal(size=(case.d, case.f))}
    return tokens | {name: x.astype(np.float32).astype(np.float64) for name, x in weights.items()}
