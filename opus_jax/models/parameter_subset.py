"""Parameters in two parts: those that move, along which utilities are taken, and those that are held fixed.

A derivative along the moving part alone leaves the blocks below it outside the differentiated function, so they are
run once, without tangents, and scoring by forward mode costs `forward_flops + 2 * moving_flops`.
"""

import math
from typing import Any

import jax

from opus_jax.models.transformer import Params

SUBSETS = ("all", "blocks", "top_half", "top_quarter")
_SHARE = {"top_half": 0.5, "top_quarter": 0.25}


def split(params: Params, subset: str) -> tuple[Params, Params]:
    """(moving, fixed); or a tree like the parameters, such as a direction, in the same two parts.

    Args:
      params: parameters of `transformer.init`.
      subset: 'all': everything moves; 'blocks': the blocks do, but not embeddings, last norm and head; 'top_half',
        'top_quarter': that share of the blocks, rounded up, counted from the last, the last norm, and a head that is
        not the embedding.

    Raises:
      ValueError: the subset does not exist.
    """
    if subset not in SUBSETS:
        raise ValueError(f"subset = {subset!r}: must be one of {', '.join(SUBSETS)}")
    if subset == "all":
        return params, {}
    if subset == "blocks":
        return {"blocks": params["blocks"]}, _without(params, "blocks")
    layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    below = layers - moving_layers(layers, subset)
    moving = {"blocks": jax.tree.map(lambda x: x[below:], params["blocks"])}
    moving |= {name: params[name] for name in ("final_norm", "head") if name in params}
    fixed = _without(params, *moving)
    return moving, fixed | ({"blocks": jax.tree.map(lambda x: x[:below], params["blocks"])} if below else {})


def join(moving: Params, fixed: Params) -> Params:
    """The parameters of both parts, for `transformer.apply`; blocks of both are two stacks, the fixed ones first."""
    if "blocks" in moving and "blocks" in fixed:
        return fixed | moving | {"blocks": (fixed["blocks"], moving["blocks"])}
    return fixed | moving


def moving_layers(layers: int, subset: str) -> int:
    """How many of the blocks move."""
    return math.ceil(_SHARE.get(subset, 1) * layers)


def _without(params: Params, *names: str) -> dict[str, Any]:
    return {name: part for name, part in params.items() if name not in names}
