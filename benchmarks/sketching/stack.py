"""A stack of transformer blocks and nothing else: activations go in, and a row's loss is their mean square coming out.

Every method sees the same function of the matrices; gains and biases are fixed, as a few thousand numbers each.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from opus_jax.models.block import Block
from opus_jax.models.precision import wide
from opus_jax.models.presets import PRESETS, ModelSpec

MATRIX = "kernel"  # the name of a weight matrix in the tree

Blocks = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """L blocks of a preset's shapes, scanned.

    Attributes:
      spec: of the blocks; embedding and head are not built.
    """

    spec: ModelSpec

    def init(self, key: Key[Array, ""]) -> Blocks:
        """{"blocks": tree of arrays [L, ...]}; gains and biases included."""
        return {"blocks": nnx.to_pure_dict(nnx.state(_build(self.spec, key)))}

    def losses(self, matrices: Blocks, fixed: Blocks, inputs: Float[Array, "N T D"]) -> Float[Array, " N"]:
        """Half the mean square of each row's last activations."""
        graph = nnx.split(nnx.eval_shape(lambda: _build(self.spec, jax.random.key(0))))[0]
        tokens = inputs.shape[1]
        mask = jnp.broadcast_to(jnp.tri(tokens, dtype=bool), (inputs.shape[0], tokens, tokens))

        def run(x: Any, block: Any) -> Any:
            return nnx.merge(graph, block)(x, mask, None), None

        if self.spec.remat == "full":
            run = jax.checkpoint(run, prevent_cse=False)
        joined = nnx.State(merge(matrices, fixed)["blocks"])
        x, _ = jax.lax.scan(run, inputs, joined)
        return 0.5 * jnp.mean(jnp.square(x.astype(wide(x.dtype))), axis=(1, 2))


def stack_of(preset: str, **changes: Any) -> Stack:
    """The blocks of a preset, positions left out: they are added to what goes in."""
    return Stack(replace(PRESETS[preset], positions="learned", **changes))


def split(tree: Blocks) -> tuple[Blocks, Blocks]:
    """(the matrices, all else), both nested as before and without empty branches."""
    return _kept(tree, True), _kept(tree, False)


def merge(first: Blocks, second: Blocks) -> Blocks:
    """Both parts in one tree again."""
    joined = dict(second)
    for name, part in first.items():
        joined[name] = merge(part, joined[name]) if name in joined else part
    return joined


def _kept(tree: Blocks, matrices: bool) -> Blocks:
    found = {}
    for name, part in tree.items():
        if isinstance(part, dict):
            part = _kept(part, matrices)
            if part:
                found[name] = part
        elif (name == MATRIX) == matrices:
            found[name] = part
    return found


def _build(spec: ModelSpec, key: Key[Array, ""]) -> Block:
    keys, depths = jax.random.split(key, spec.layers), jnp.arange(spec.layers, dtype=jnp.float32)
    return nnx.vmap(functools.partial(Block, spec))(keys, depths)
