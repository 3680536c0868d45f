"""Choosing documents instead of rows: a row is kept for its chosen documents, and trained on those alone.

Documents are drawn as rows are (`opus.select`: standardised over the buffer, softmax, without replacement), a share of
all there are. A row is worth the sum of the utilities of its chosen documents, and the K rows of the highest worth are
kept: a row's cost is its length, whatever of it is trained on.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from opus_jax.selection.opus import Diagnostics, Standardised, at_entropy, report, standardise
from opus_jax.selection.sampling import Temperature, check_size, check_temperature, is_number, ranking


def select(
    utilities: Float[Array, "N S"],
    present: Bool[Array, "N S"],
    k: int,
    *,
    share: float | Float[Array, ""],
    temperature: float,
    key: Key[Array, ""],
    entropy: float | None = None,
) -> tuple[Int[Array, " K"], Bool[Array, "N S"], Diagnostics]:
    """Draw round(share * M) of the M documents, at least one, and keep k rows.

    Rows are ranked: first those of a chosen document, by the sum of the utilities of their chosen ones; then those of
    none, by their best, which is kept with them; then those with a utility that is not finite, since what is wrong with
    one document of a row can spoil the losses of all. Their documents count as not finite too: none is drawn, they are
    left out of mean and spread, and nothing is left out of such a row where fewer than k others exist.

    Args:
      utilities: [N, S], higher is better, any scale.
      present: [N, S], where there is a document that was scored.
      k: how many rows.
      share: of the documents, above 0 and at most 1.
      temperature, key, entropy: as for `opus.select`, with documents for candidates. At an infinite temperature
        documents are drawn at random, and rows are still ranked by what they got.

    Returns:
      int32[K] positions of rows, sorted; [N, S] true for documents that are not to be trained on if their row is kept:
      at least one present document of every row is not; and the diagnostics of `opus.select`: `z` standardises the
      rows' sums over all their documents, `probability` is 1 / k on the rows kept, `nonfinite` counts rows.

    Raises:
      UserError: k is not between 1 and N, the temperature is negative, or the entropy is not above 0 and at most 1.
    """
    rows, columns = utilities.shape
    check_size(rows, k)
    check_temperature(temperature)
    sound = jnp.all(jnp.isfinite(utilities) | ~present, axis=1)
    drawable = present & sound[:, None]
    buffer, in_use = at_entropy(standardise(jnp.where(drawable, utilities, jnp.nan).ravel()), temperature, entropy)
    document_key, row_key = jax.random.split(key)
    order = _order(buffer, drawable.ravel(), in_use, document_key)
    chosen = (order < _count(share, drawable)).reshape(rows, columns) & drawable
    indices = _best_rows(utilities, chosen, drawable, sound, buffer.degenerate, k, row_key)
    best = jnp.argmax(jnp.where(drawable, utilities, -jnp.inf), axis=1)
    kept_anyway = (jnp.arange(columns) == best[:, None]) & ~jnp.any(chosen, axis=1, keepdims=True)
    whole = standardise(jnp.where(sound, jnp.sum(jnp.where(drawable, utilities, 0), axis=1), jnp.nan))
    probability = jnp.zeros(rows, jnp.float32).at[indices].set(1 / k)
    found = report(whole, probability, in_use) | {"degenerate": buffer.degenerate}
    return indices, drawable & ~chosen & ~kept_anyway, found


def _order(
    buffer: Standardised, drawable: Bool[Array, " M"], temperature: Temperature, key: Key[Array, ""]
) -> Int[Array, " M"]:
    """Place of each document in the order of the draws; what cannot be drawn comes last."""
    noisy = ranking(buffer.logits, ~drawable, temperature=temperature, key=key)
    if is_number(temperature, 0):
        random = ranking(buffer.logits, ~drawable, temperature=1.0, key=key)
        noisy = jnp.where(buffer.degenerate, random, noisy)
    return jnp.argsort(jnp.argsort(-noisy))


def _count(share: float | Float[Array, ""], drawable: Bool[Array, "N S"]) -> Int[Array, ""]:
    return jnp.maximum(jnp.round(share * jnp.sum(drawable)).astype(jnp.int32), 1)


def _best_rows(
    utilities: Float[Array, "N S"],
    chosen: Bool[Array, "N S"],
    drawable: Bool[Array, "N S"],
    sound: Bool[Array, " N"],
    degenerate: Bool[Array, ""],
    k: int,
    key: Key[Array, ""],
) -> Int[Array, " K"]:
    """Where all documents are worth the same, rows are drawn at random: most documents is no merit."""
    any_chosen = jnp.any(chosen, axis=1)
    of_chosen = jnp.sum(jnp.where(chosen, utilities, 0), axis=1)
    of_best = jnp.max(jnp.where(drawable, utilities, -jnp.inf), axis=1)
    worth = jnp.where(degenerate, jax.random.uniform(key, sound.shape), jnp.where(any_chosen, of_chosen, of_best))
    rank = jnp.where(sound, 1 + (any_chosen & ~degenerate), 0)
    return jnp.sort(jnp.lexsort((-worth, -rank))[:k]).astype(jnp.int32)
