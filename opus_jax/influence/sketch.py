"""CountSketch of gradients, layer by layer: a few thousand numbers whose inner products are those of the gradients."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Key, PyTree


def count_sketch(gradients: PyTree[Float[Array, "N ..."]], m: int, key: Key[Array, ""]) -> Float[Array, "N L m"]:
    """Sketch of every example's gradient, one of width m per layer matrix.

    Entry p of a matrix is added, with a random sign, to entry p mod m of its sketch. E <sketch x, sketch y> = <x, y>
    over keys, exact where the matrix has at most m entries; the variance is at most about
    (|x|^2 |y|^2 + <x, y>^2) / m (Charikar, Chen, Farach-Colton 2002). Signs alone make it unbiased, so the place of an
    entry may be its position: no scatter is needed.

    Args:
      gradients: leaves [N, ...]. [N, L, in, out] counts as L matrices, any other leaf as one.
      m: width of a sketch.
      key: the same key is the same hash: sketches of candidates and proxy under one key have inner products.

    Returns:
      [N, matrices of all leaves in their order, m], float32 or wider.
    """
    return hashed(gradients, random_signs(jax.tree.map(lambda g: g[0], gradients), key), m)


def random_signs(like: PyTree[Array], key: Key[Array, ""]) -> PyTree[Int8[Array, "..."]]:
    """A sign for every entry of a tree."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, jnp.int8) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, signs)


def hashed(
    gradients: PyTree[Float[Array, "N ..."]], signs: PyTree[Int8[Array, "..."]], m: int
) -> Float[Array, "N L m"]:
    """`count_sketch` with signs drawn before, for callers that sketch part by part."""
    sketches = jax.tree.map(lambda g, s: _hashed_leaf(g, s, m), gradients, signs)
    return jnp.concatenate(jax.tree.leaves(sketches), axis=1)


def _hashed_leaf(gradients: Float[Array, "N ..."], signs: Int8[Array, "..."], m: int) -> Float[Array, "N L m"]:
    signed = gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32)) * signs
    rows, layers = signed.shape[0], signed.shape[1] if signed.ndim > 3 else 1
    flat = signed.reshape(rows, layers, math.prod(signed.shape[1:]) // layers)
    padded = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % m)))
    return padded.reshape(rows, layers, -1, m).sum(axis=2)
