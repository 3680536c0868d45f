"""Which parameters are decayed, and which go to Muon: read from the names and ranks in the parameter tree."""

from typing import Any

import jax
from jaxtyping import PyTree

BLOCKS = "blocks"  # subtree whose leaves are stacked over layers, [L, ...]
VECTORS = ("bias", "scale", "gain")  # never matrices, whatever their rank
KERNEL = "kernel"  # a linear map, [in, out], or [L, in, out] in the blocks


def group_labels(params: PyTree[Any]) -> PyTree[str]:
    """'muon' for the stacked block matrices [L, in, out], 'adam' for everything else (embedding, head, gains).

    A rank rule would not do: it sends the embedding to Muon and the stacked [L, in, out] kernels to Adam.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: "muon" if _is_block_kernel(path, x) else "adam", params)


def decay_mask(params: PyTree[Any]) -> PyTree[bool]:
    """True for matrices and embeddings; False for gains, biases and norms."""
    return jax.tree_util.tree_map_with_path(_is_matrix, params)


def _is_block_kernel(path: tuple[Any, ...], x: Any) -> bool:
    names = _names(path)
    return BLOCKS in names and names[-1] == KERNEL and x.ndim == 3


def _is_matrix(path: tuple[Any, ...], x: Any) -> bool:
    names = _names(path)
    stacked = BLOCKS in names
    return not (names and names[-1] in VECTORS) and x.ndim - stacked >= 2


def _names(path: tuple[Any, ...]) -> list[str]:
    return [jax.tree_util.keystr((key,), simple=True) for key in path]
