"""A decoder-only transformer: Flax NNX modules define it, plain functions on plain parameter trees run it.

Glossary, for shapes everywhere in this package:
  N  candidates (rows of a buffer)      K  rows selected for the update     B  rows of any batch
  T  tokens in a row                    D  model width                      F  width of the MLP
  H  attention heads                    V  vocabulary                       L  layers
  M  width of a gradient sketch         G  domains
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from opus_jax.distributed.axes import LogicalAxes, constrain
from opus_jax.errors import UserError
from opus_jax.models.attention import attention_mask
from opus_jax.models.block import Block
from opus_jax.models.linear import Linear
from opus_jax.models.norms import Norm
from opus_jax.models.positions import rotary_turns, segment_positions
from opus_jax.models.precision import wide
from opus_jax.models.presets import ModelSpec
from opus_jax.models.tapped import lookup, product, product_with_transposed

Params = dict[str, Any]  # nested dictionaries of float32 arrays; the leaves under "blocks" are stacked [L, ...]


class Embedding(nnx.Module):
    """A table of vectors looked up by id."""

    def __init__(self, table: Float[Array, "V D"], logical: LogicalAxes):
        self.embedding, self.rows = nnx.Param(table, logical=logical), logical[0]

    def __call__(self, ids: Int[Array, "N T"], dtype: str) -> Float[Array, "N T D"]:
        # Vectors split over the axis that also splits the ids would be looked up on every device and then cut.
        whole = lambda table: constrain(table.astype(dtype), (self.rows, None))  # noqa: E731
        return lookup(self.embedding.get_value(), ids, whole)


class Transformer(nnx.Module):
    """Embeddings, L equal blocks stacked and scanned, a last norm, and the head."""

    def __init__(self, spec: ModelSpec, key: jax.Array):
        self.spec = spec
        rngs = nnx.Rngs(params=key)
        self.embedding = _table(spec, rngs, spec.vocab_size, "vocab")
        self.positions = _table(spec, rngs, spec.max_length, "length") if spec.positions == "learned" else None
        depths = jnp.arange(spec.layers, dtype=jnp.float32)
        keys = jax.random.split(rngs.params(), spec.layers)
        self.blocks = nnx.vmap(functools.partial(Block, spec))(keys, depths)
        self.final_norm = Norm(spec.width, spec.norm_kind, spec.norm_eps, bias=spec.bias)
        self.head = None if spec.tied else _head(spec, rngs)

    def __call__(
        self,
        tokens: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        higher_blocks: tuple[Params, ...] = (),
    ) -> Float[Array, "N T V"]:
        x = self.embedding(tokens, self.spec.dtype)
        if self.positions is not None:
            x = x + self.positions(positions, self.spec.dtype)
        x = constrain(x * self.spec.embedding_scale, ("batch", "length", "activation"))
        rotary = self.spec.positions == "rope"
        turns = rotary_turns(positions, self.spec.head_dim, self.spec.rope_theta) if rotary else None
        x = self.final_norm(self._scan_blocks(x, attention_mask(segment_ids), turns, higher_blocks))
        return constrain(self._logits(x), ("batch", "length", "vocab"))

    def _logits(self, x: Float[Array, "N T D"]) -> Float[Array, "N T V"]:
        if self.head is None:
            return product_with_transposed(x, self.embedding.embedding.get_value(), dtype=wide(x.dtype))
        return product(x, self.head.kernel.get_value(), dtype=wide(x.dtype))

    def _scan_blocks(
        self,
        x: Float[Array, "N T D"],
        mask: Bool[Array, "N T T"],
        turns: Float[Array, "N T 2 half"] | None,
        higher_blocks: tuple[Params, ...],
    ) -> Float[Array, "N T D"]:
        graph, lowest = nnx.split(self.blocks)

        def run(x: Any, block: Any) -> Any:
            return nnx.merge(graph, block)(x, mask, turns), None

        for stack in (lowest, *map(nnx.State, higher_blocks)):
            x = jax.lax.scan(_rematerialised(run, self.spec.remat), x, stack)[0]
        return x


def init(spec: ModelSpec, key: jax.Array) -> Params:
    """Fresh parameters. Jit it with `out_shardings` to create them where they belong."""
    return nnx.to_pure_dict(nnx.state(Transformer(spec, key)))


def apply(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "N T"],
    segment_ids: Int[Array, "N T"],
    *,
    positions: Int[Array, "N T"] | None = None,
) -> Float[Array, "N T V"]:
    """Logits in float32 (or wider); those at t predict token t + 1.

    A token sees the tokens of its own segment up to itself. `segment_ids` 0 is padding: it changes no other logits.
    `positions` count from 0 in every segment unless given. `params["blocks"]` may be a tuple of stacks, lowest first,
    which are run one after the other.

    Raises:
      UserError: a row is longer than the table of learned positions.
    """
    if spec.positions == "learned" and tokens.shape[1] > spec.max_length:
        raise UserError(f"rows of {tokens.shape[1]} tokens, but model.max_length = {spec.max_length}: raise it")
    if positions is None:
        positions = segment_positions(segment_ids)
    stacks = params["blocks"] if isinstance(params["blocks"], tuple) else (params["blocks"],)
    model = nnx.merge(_graph(spec), nnx.State({**params, "blocks": stacks[0]}))
    return model(tokens, segment_ids, positions, stacks[1:])


def logical_axes(spec: ModelSpec) -> dict[str, Any]:
    """The tree of `init` with, for each array, the logical names of its dimensions."""
    state = nnx.state(_abstract(spec))
    stacked = {"blocks": ("layer",)}
    axes = {
        name: jax.tree.map(lambda leaf, name=name: stacked.get(name, ()) + leaf.logical, part, is_leaf=_is_variable)
        for name, part in state.items()
    }
    return nnx.to_pure_dict(nnx.State(axes))


def matrix_uses(spec: ModelSpec) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Matrices that are not only multiplied with: names, and how they are used."""
    embedding = ("lookup", "product") if spec.tied else ("lookup",)
    return ("embedding.embedding", embedding), ("positions.embedding", ("lookup",))


def parameter_count(spec: ModelSpec) -> int:
    """Number of parameters; nothing is allocated."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(_abstract(spec))))


@functools.lru_cache(maxsize=64)
def _abstract(spec: ModelSpec) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(spec, jax.random.key(0)))


@functools.lru_cache(maxsize=64)
def _graph(spec: ModelSpec) -> nnx.GraphDef:
    return nnx.split(_abstract(spec))[0]


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _table(spec: ModelSpec, rngs: nnx.Rngs, rows: int, logical: str) -> Embedding:
    """Standard deviation 1 when untied; a tied table is also the head and has the head's scale."""
    tied_std = 0.02 if spec.init == "official" else spec.width**-0.5
    std = tied_std if spec.tied else 1.0
    return Embedding(std * jax.random.normal(rngs.params(), (rows, spec.width)), (logical, "embed"))


def _head(spec: ModelSpec, rngs: nnx.Rngs) -> Linear:
    kernel = spec.width**-0.5 * jax.random.truncated_normal(rngs.params(), -3, 3, (spec.width, spec.vocab_size))
    return Linear(kernel, ("embed", "vocab"), bias=False)


def _rematerialised(run: Any, remat: str) -> Any:
    """What the backward pass recomputes: nothing, the whole block, or all but the products with weights."""
    if remat == "none":
        return run
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(run, prevent_cse=False, policy=policy)
