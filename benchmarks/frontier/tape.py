"""A run that trains on random rows, and at every step of it the scores of the candidates by many scorers."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.frontier.scorers import FRESH, Proxy, Scorer
from opus_jax.config import replace
from opus_jax.data.buffers import every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.influence import directional, low_rank
from opus_jax.influence.proxy import update_proxy_gradient
from opus_jax.models import parameter_subset
from opus_jax.models.loss import targets, token_losses
from opus_jax.models.presets import ModelSpec
from opus_jax.optim.preconditioner import direction_with_report
from opus_jax.training.batches import Batch, window
from opus_jax.training.build import Parts
from opus_jax.training.feed import put_rows
from opus_jax.training.state import TrainState, init_state
from opus_jax.training.update import mean_gradient

Scores = dict[Scorer, Any]

EXACT = Scorer()
PROXIES = (
    FRESH, Proxy(5), Proxy(10), Proxy(20), Proxy(5, 0.5),
    Proxy(1, 0.8, 16), Proxy(1, 0.9, 32), Proxy(2, 0.8, 16), Proxy(2, 0.7, 8), Proxy(5, 0.5, 4),
)  # fmt: skip
SPREADS = ((16, 4), (32, 4), (64, 8))  # (part, pieces)
LONG, SHORT = (1, 2, 4, 8, 12, 16, 32), (4, 8, 12, 16, 32)
FACTORS = (
    *(Scorer(part, place="random", derivative="difference") for part in (4, 8, 16)),
    Scorer(4, parameters="top_half"),
    Scorer(4, rank=4),
    Scorer(4, rank=16),
    Scorer(4, dtype="bfloat16"),
)
WHOLE = Scorer(derivative="difference")


@dataclass(frozen=True)
class Moment:
    """One step: the domains and documents of the candidates, int64[N] and [N, S], and their scores, float64[N]."""

    domains: np.ndarray
    documents: np.ndarray
    scores: dict[Scorer, np.ndarray]


@dataclass(frozen=True)
class Length:
    """How a run is probed.

    Attributes:
      steps: scored ones, after `warm_steps` that are not.
      chunk: candidates whose whole rows are scored at once.
      factors_every: steps between scores by the factors.
      factors: scorers that are measured now and then only.
    """

    steps: int
    warm_steps: int
    chunk: int
    factors_every: int = 5
    factors: tuple[Scorer, ...] = (*FACTORS, WHOLE)


def record(parts: Parts, length: Length) -> Iterator[Moment]:
    """The moments of one run."""
    config = parts.config
    state = init_state(parts.spec, parts.optimizer, config.run.seed, parts.mesh, directed=True)
    candidates, proxies = _stream(parts, "train", config.candidates), _stream(parts, "proxy", config.proxy.rows)
    for _ in range(length.warm_steps):
        state = _trained(parts, state, next(candidates))
    probe = Probe(parts, length)
    for step in range(length.steps):
        host = next(candidates)
        scores = probe.scores(step, state, put_rows(host, parts.mesh), put_rows(next(proxies), parts.mesh))
        yield Moment(np.asarray(host["domain_id"]), np.asarray(host["document_ids"]), scores)
        state = _trained(parts, state, host)


def kept(file: Path, parts: Parts, length: Length) -> list[Moment]:
    """The moments of one run, read from the file if it is there."""
    if not file.is_file():
        moments = list(record(parts, length))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(moments))
    return pickle.loads(file.read_bytes())


def _trained(parts: Parts, state: TrainState, host: dict[str, np.ndarray]) -> TrainState:
    """After an update on the first rows, which are as random as any."""
    rows = {name: x[: parts.config.batch.rows] for name, x in host.items()}
    return parts.update_step(state, put_rows(rows, parts.mesh), None)[0]


def _stream(parts: Parts, split: str, rows: int) -> Iterator[dict[str, np.ndarray]]:
    plan = parts.candidate_plan() if split == "train" else parts.proxy_plan()
    return iter(CandidateStream(parts.reader(split), plan, parts.config.run.seed, every_step(rows)))


class Probe:
    """Scores by all scorers, along directions made of proxy gradients of several ages."""

    def __init__(self, parts: Parts, length: Length):
        self._parts, self._length = parts, length
        self._gradients: dict[Proxy, Any] = {}
        self._fresh = jax.jit(self._fresh_gradient)
        self._renewed = jax.jit(lambda old, new, count, ema: update_proxy_gradient(old, count, lambda: new, ema=ema),
                                static_argnames="ema")  # fmt: skip
        self._all = jax.jit(self._scores)
        self._factors = jax.jit(self._by_factors)

    def scores(self, step: int, state: TrainState, rows: Batch, proxy: Batch) -> dict[Scorer, np.ndarray]:
        """float64[N] by scorer, at a step counted from 0."""
        with jax.set_mesh(self._parts.mesh):
            due = [known for known in PROXIES if step % known.period == 0]
            tokens = proxy["tokens"].shape[1]
            fresh = {
                part: self._fresh(state.params, window(proxy, tokens // part)) for part in {known.part for known in due}
            }
            for known in due:
                old = self._gradients.get(known, fresh[known.part])
                self._gradients[known] = self._renewed(old, fresh[known.part], step // known.period, ema=known.ema)
            found = self._all(state, tuple(self._gradients[known] for known in PROXIES), rows)
            if step % self._length.factors_every == 0:
                found |= self._factors(state, fresh[1], rows)
        return {scorer: np.asarray(x, np.float64) for scorer, x in found.items()}

    def _fresh_gradient(self, params: Any, proxy: Batch) -> Any:
        return mean_gradient(self._parts.spec, params, proxy, self._parts.config.batch.microbatch)[0]

    def _direction(self, state: TrainState, gradient: Any) -> Any:
        reference, optimizer = state.reference_gradient, self._parts.optimizer
        mode = self._parts.config.selection.direction
        return direction_with_report(optimizer, state.opt_state, state.params, reference, gradient, mode=mode)[0]

    def _scores(self, state: TrainState, gradients: tuple[Any, ...], rows: Batch) -> Scores:
        spec, chunk = self._parts.spec, self._length.chunk
        directions = [self._direction(state, gradient) for gradient in gradients]
        whole = directional.token_utilities(partial(token_losses, spec), state.params, directions[0], rows, chunk=chunk)
        found: Scores = prefixes(whole, rows, [Scorer(part) for part in LONG])
        quarter = window(rows, rows["tokens"].shape[1] // SHORT[0])
        pieces = {spread: cut_out(rows, *spread) for spread in SPREADS}

        def along(v: Any) -> list[jax.Array]:
            return [differences(spec, state.params, v, cut, None) for cut in (quarter, *pieces.values())]

        stacked = jax.lax.map(along, jax.tree.map(lambda *x: jnp.stack(x), *directions))
        for i, proxy in enumerate(PROXIES):
            scorers = [Scorer(part, derivative="difference", proxy=proxy) for part in SHORT]
            found |= prefixes(stacked[0][i], rows, scorers)
            for tokens, (spread, cut) in zip(stacked[1:], pieces.items(), strict=True):
                found |= sparser(tokens[i], cut, spread, proxy)
        return found

    def _by_factors(self, state: TrainState, gradient: Any, rows: Batch) -> Scores:
        v, key = self._direction(state, gradient), jax.random.fold_in(state.key, state.step)
        found: Scores = {}
        for scorer in self._length.factors:
            spec = replace(self._parts.spec, dtype=scorer.dtype or self._parts.spec.dtype)
            cut = window(rows, rows["tokens"].shape[1] // scorer.part, scorer.place, key)
            moving, fixed = parameter_subset.split(state.params, scorer.parameters)
            losses = lambda part, batch, fixed=fixed, spec=spec: token_losses(  # noqa: E731
                spec, parameter_subset.join(part, fixed), batch
            )
            slopes = partial(directional.token_utilities, method=scorer.derivative)
            if scorer.rank is not None:
                slopes = partial(low_rank.utilities, rank=scorer.rank)
            along = parameter_subset.split(v, scorer.parameters)[0]
            tokens = slopes(losses, moving, along, cut, chunk=self._length.chunk)
            found[scorer] = tokens.sum(1) / jnp.maximum(targets(cut).sum(1), 1)
        return found


def differences(spec: ModelSpec, params: Any, v: Any, rows: Batch, chunk: int | None) -> jax.Array:
    """[N, T]: utilities of tokens by central differences."""
    losses = partial(token_losses, spec)
    return directional.token_utilities(losses, params, v, rows, method="difference", chunk=chunk)


def prefixes(tokens: jax.Array, rows: Batch, scorers: list[Scorer]) -> Scores:
    """Utilities [N] of prefix windows, out of those of the tokens of a longer one."""
    counted, length = targets(rows), rows["tokens"].shape[1]
    cuts = {scorer: length // scorer.part for scorer in scorers}
    return {scorer: tokens[:, :cut].sum(1) / jnp.maximum(counted[:, :cut].sum(1), 1) for scorer, cut in cuts.items()}


def cut_out(rows: Batch, part: int, pieces: int) -> Batch:
    """[N pieces, T / part]: windows that begin at even distances over the row, as rows of their own."""
    length = rows["tokens"].shape[1] // part

    def cut(x: jax.Array) -> jax.Array:
        windows = x[:, : part * length].reshape(len(x), part, length)
        return windows[:, :: part // pieces].reshape(-1, length)

    return {name: cut(x) for name, x in rows.items()}


def sparser(tokens: jax.Array, cut: Batch, spread: tuple[int, int], proxy: Proxy) -> Scores:
    """Utilities [N] by all the pieces, and by every second of them, and so on."""
    part, pieces = spread
    sums, counts = (x.sum(1).reshape(-1, pieces) for x in (tokens, targets(cut)))
    found: Scores = {}
    taken = pieces
    while taken > 1:
        stride = pieces // taken
        total = sums[:, ::stride].sum(1) / jnp.maximum(counts[:, ::stride].sum(1), 1)
        found[Scorer(part, taken, derivative="difference", proxy=proxy)] = total
        taken //= 2
    return found
