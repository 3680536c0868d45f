"""Bits per byte of held-out text, by domain: comparable between tokenizers, row lengths and vocabularies.

bits per byte = nats of the source tokens / ln 2 / UTF-8 bytes of the source. BOS is never predicted, and EOS, which no
byte of the source stands for, is predicted but not counted.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float64, Int64, Integer, PyTree

from opus_jax.config import EvaluationConfig
from opus_jax.data.documents import require_known
from opus_jax.data.records import Manifest, RowReader, batch_of
from opus_jax.distributed.axes import replicated, sharding
from opus_jax.errors import UserError
from opus_jax.models.loss import token_losses
from opus_jax.models.presets import ModelSpec

Params = PyTree[Float[Array, "..."]]
HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluator:
    """Measures the same validation rows at every call.

    Attributes:
      domains: names, in the order of the domain ids; those without validation rows are left out of every result.
      rows: int64[R], the rows measured, as indices into the validation split; domain by domain.
      row_domains: int64[R], their domain ids.
      validation_bytes: UTF-8 bytes of each domain's whole validation split.
    """

    domains: tuple[str, ...]
    rows: Int64[np.ndarray, " R"]
    row_domains: Int64[np.ndarray, " R"]
    validation_bytes: Mapping[str, int]
    measure: Callable[[Any], tuple[Float64[np.ndarray, " R"], Int64[np.ndarray, " R"]]]

    def __call__(self, params: Params) -> dict[str, float]:
        """Bits per byte of each domain that has validation rows. Sums are float64."""
        nats, size = self.measure(params)
        width = len(self.domains)
        nats_by_domain = np.bincount(self.row_domains, nats, width)
        bytes_by_domain = np.bincount(self.row_domains, size.astype(np.float64), width)
        return {
            name: float(n / math.log(2) / b)
            for name, n, b in zip(self.domains, nats_by_domain, bytes_by_domain, strict=True)
            if b > 0
        }

    def target(self, bits_per_byte: Mapping[str, float], domains: Sequence[str]) -> float:
        """Bits per byte over all validation text of `domains`: each domain weighs by the bytes of its split.

        So the result is bits over bytes of the split, whatever share of each domain's rows was measured.

        Raises:
          UserError: there is no validation text in any of them.
        """
        weights = {name: self.validation_bytes[name] for name in domains if name in bits_per_byte}
        total = sum(weights.values())
        if total == 0:
            raise UserError(
                f"proxy.domains: no validation text in {', '.join(domains)}; there is some in "
                f"{', '.join(bits_per_byte) or 'no domain'}: choose among those, or raise corpus.validation_share"
            )
        return sum(bits_per_byte[name] * (weight / total) for name, weight in weights.items())


def make_evaluator(
    spec: ModelSpec,
    mesh: Mesh,
    reader: RowReader,
    manifest: Manifest,
    token_bytes: Integer[np.ndarray, " V"],
    config: EvaluationConfig,
) -> Evaluator:
    """An evaluator over a fixed subset of the validation rows, spread over each domain.

    Args:
      reader: the validation split.
      token_bytes: UTF-8 bytes that each token stands for; tokens with 0 are not counted.
      config: `rows` per domain at most, of `domains` (null = all), `batch_rows` at a time, which the mesh's data shards
        must divide.

    Raises:
      ConfigError: `domains` names an unknown one.
    """
    wanted = manifest.domains if config.domains is None else config.domains
    require_known("evaluation.domains", wanted, manifest.domains)
    per_domain = [config.rows if name in wanted else 0 for name in manifest.domains]
    chosen = [spread(np.asarray(r, np.int64), n) for r, n in zip(reader.domain_rows, per_domain, strict=True)]
    rows = np.concatenate([np.zeros(0, np.int64), *chosen])
    row_domains = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
    row_nats = _jit_row_nats(spec, mesh)

    def measure(params: Params) -> tuple[Float64[np.ndarray, " R"], Int64[np.ndarray, " R"]]:
        nats, size = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        for start, batch in _batches(reader, rows, token_bytes, config.batch_rows):
            part = slice(start, min(start + config.batch_rows, len(rows)))
            size[part] = np.where(batch["loss_mask"] > 0, token_bytes[batch["tokens"]], 0).sum(1)[: part.stop - start]
            nats[part] = row_nats(params, batch)[: part.stop - start]
        return nats, size

    validation_bytes = {name: int(manifest.bytes["validation"][name]) for name in manifest.domains}
    return Evaluator(tuple(manifest.domains), rows, row_domains, validation_bytes, measure)


def spread(rows: Int64[np.ndarray, " R"], count: int) -> Int64[np.ndarray, " n"]:
    """At most `count` of the rows, at equal distances."""
    if len(rows) <= count or not count:
        return rows[:count]
    return rows[np.arange(count) * len(rows) // count]


def _batches(
    reader: RowReader, rows: np.ndarray, token_bytes: np.ndarray, batch_rows: int
) -> Iterator[tuple[int, HostBatch]]:
    """(index of the first row, batch) of equal shapes; the last batch is filled up with copies of its last row."""
    for start in range(0, len(rows), batch_rows):
        batch = batch_of(reader.read(_filled_up(rows[start : start + batch_rows], batch_rows)))
        counted = batch["loss_mask"] * (token_bytes[batch["tokens"]] > 0)
        yield start, {"tokens": batch["tokens"], "segment_ids": batch["segment_ids"], "loss_mask": counted}


def _filled_up(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows))])


def _jit_row_nats(spec: ModelSpec, mesh: Mesh) -> Callable[[Any, HostBatch], Float[np.ndarray, " N"]]:
    """Nats of each row's targets, the rows split over the mesh's data axes, the result on every process."""

    @jax.jit
    def row_nats(params: Any, batch: Any) -> Float[Array, " N"]:
        nats = token_losses(spec, params, batch).sum(axis=1)
        return jax.lax.with_sharding_constraint(nats, replicated(mesh))

    def place(x: np.ndarray) -> jax.Array:
        split = sharding(mesh, ("batch", None), x.shape)
        return jax.make_array_from_callback(x.shape, split, lambda index: x[index])

    def run(params: Any, batch: HostBatch) -> Float[np.ndarray, " N"]:
        with jax.set_mesh(mesh):
            return np.asarray(row_nats(params, {name: place(x) for name, x in batch.items()}))

    return run
