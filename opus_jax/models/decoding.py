"""Text from a model, one token at a time. There is no cache: each token costs a forward pass over the whole row."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from opus_jax.errors import UserError
from opus_jax.models.presets import ModelSpec
from opus_jax.models.transformer import Params, apply

_SHORTEST_ROW = 64  # rows double from here as they fill, so that few lengths are compiled


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Raises:
      UserError: a value is out of range.
    """

    temperature: float = 1.0  # divides the logits; 0 = always the most likely token
    top_k: int | None = None  # draw among this many most likely tokens; null = all
    top_p: float | None = None  # draw among the fewest most likely tokens that hold this probability; null = all
    vocabulary: int | None = None  # draw ids below this only, where the model has more than the tokenizer

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, f"temperature = {self.temperature}: must be at least 0 (0 = most likely token)")
        _require(self.top_k is None or self.top_k >= 1, f"top_k = {self.top_k}: must be at least 1")
        _require(self.top_p is None or 0 < self.top_p <= 1, f"top_p = {self.top_p}: must be above 0 and at most 1")


def generate(
    spec: ModelSpec,
    params: Params,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_id: int | None = None,
) -> list[int]:
    """The ids of `generate_tokens` as a list."""
    sampling = Sampling(temperature, top_k, top_p)
    tokens = generate_tokens(
        spec, params, prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, key=key, eos_id=eos_id
    )
    return list(tokens)


def generate_tokens(
    spec: ModelSpec,
    params: Params,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue the prompt; ends before it would yield `eos_id`.

    Token number i of the row is drawn with fold_in(key, i), so that equal keys give equal text. The key is needed
    unless the temperature is 0.

    Raises:
      UserError: the prompt is empty or has unknown ids, the key is missing, or the learned positions end.
    """
    _check(spec, prompt_ids, max_new_tokens, sampling, key)
    row = jnp.asarray([prompt_ids], jnp.int32)
    key = jax.random.key(0) if key is None else key
    for length in range(len(prompt_ids), len(prompt_ids) + max_new_tokens):
        if length >= row.shape[1]:
            row = jnp.pad(row, ((0, 0), (0, _row_length(spec, length + 1) - row.shape[1])))
        row, token = extend(spec, sampling, params, row, jnp.int32(length), key)
        if int(token) == eos_id:
            return
        yield int(token)


@functools.partial(jax.jit, static_argnums=(0, 1))
def extend(
    spec: ModelSpec,
    sampling: Sampling,
    params: Params,
    row: Int[Array, "1 T"],
    length: Int[Array, ""],
    key: jax.Array,
) -> tuple[Int[Array, "1 T"], Int[Array, ""]]:
    """Write token number `length` behind the ones that are there."""
    inside = (jnp.arange(row.shape[1]) < length).astype(jnp.int32)[None]
    logits = apply(spec, params, row, inside)[0, length - 1]
    if sampling.vocabulary is not None:
        logits = jnp.where(jnp.arange(logits.shape[0]) < sampling.vocabulary, logits, -jnp.inf)
    if sampling.temperature == 0:
        token = jnp.argmax(logits).astype(jnp.int32)
    else:
        kept = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        token = jax.random.categorical(jax.random.fold_in(key, length), kept).astype(jnp.int32)
    return row.at[0, length].set(token), token


def keep_likely(logits: Float[Array, " V"], top_k: int | None, top_p: float | None) -> Float[Array, " V"]:
    """Logits with -inf outside the `top_k` largest, then outside the smallest set of probability `top_p`.

    Equal logits at the edge are all kept.
    """
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[0]))[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, descending=True)
        probability = jax.nn.softmax(ordered)
        held_before = jnp.cumsum(probability) - probability
        least = jnp.min(jnp.where(held_before < top_p, ordered, jnp.inf))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _row_length(spec: ModelSpec, needed: int) -> int:
    length = max(_SHORTEST_ROW, 1 << (needed - 1).bit_length())
    return min(length, spec.max_length) if spec.positions == "learned" else length


def _check(
    spec: ModelSpec, prompt_ids: Sequence[int], max_new_tokens: int, sampling: Sampling, key: jax.Array | None
) -> None:
    _require(len(prompt_ids) > 0, "the prompt is empty: give at least one token, such as the tokenizer's bos_id")
    known = all(0 <= token < spec.vocab_size for token in prompt_ids)
    _require(known, f"the prompt has ids outside the model's vocabulary of {spec.vocab_size}: use its own tokenizer")
    _require(max_new_tokens >= 0, f"max_new_tokens = {max_new_tokens}: must be at least 0")
    _require(sampling.temperature == 0 or key is not None, "drawing tokens needs a key: give a seed, or temperature 0")
    end = len(prompt_ids) + max_new_tokens
    fits = spec.positions != "learned" or end <= spec.max_length
    _require(fits, f"prompt and new tokens are {end} together, but the model has {spec.max_length} learned positions")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
