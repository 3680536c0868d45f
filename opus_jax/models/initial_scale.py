"""Standard deviations of freshly drawn kernels.

No kernel starts at zero: behind SimpleNorm its gradient would grow like 1 / sqrt(eps).
"""

from jaxtyping import Array, Float

from opus_jax.models.presets import ModelSpec

Depth = Float[Array, ""] | float  # of a block, 0 for the first


def input_std(spec: ModelSpec, fan_in: int) -> float:
    """Maps that read the residual stream: fan_in^-1/2, or 0.02 (official)."""
    return 0.02 if spec.init == "official" else fan_in**-0.5


def output_std(spec: ModelSpec, fan_in: int, depth: Depth) -> Depth:
    """Maps that write to it: (2 L fan_in)^-1/2, or the official depth-scaled deviation."""
    if spec.init == "official":
        return official_depth_std(depth)
    return (2 * spec.layers * fan_in) ** -0.5


def official_depth_std(depth: Depth) -> Depth:
    """0.02 (2 (depth + 1))^-1/2, as in the code of SimpleGPT (arXiv 2602.01212)."""
    return 0.02 * (2 * (depth + 1)) ** -0.5
