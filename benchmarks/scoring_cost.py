"""What cheaper scores cost and how well they agree with exact ones, counted over every optimizer step.

`spearman.<mode>`: rank agreement of the scores as used with the exact utilities (forward mode, float32, whole row, all
parameters) of that step's candidates, averaged over all steps of a run that chooses at random. A step without scores
counts as agreement 0; in the modes `feedback_groups` the estimate of a row's groups stands in for them, with the lag
that plans have. `overhead.<mode>`: FLOPs of scoring, proxy and direction over those of plain training, as `training`
counts them; `time_overhead.<mode>`: measured in one process, in turn with steps that do not choose.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr

from benchmarks.efficiency.mixes import REPORT, pool
from benchmarks.harness import Figures, alternate, run_benchmark
from opus_jax.config import Config, from_mapping, replace
from opus_jax.data.buffers import every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.selection.feedback import FeedbackState
from opus_jax.training.build import Parts, buffers_of, build
from opus_jax.training.costs import step_costs
from opus_jax.training.feed import put_rows
from opus_jax.training.scoring import Chooser
from opus_jax.training.state import TrainState, init_state

ROW_TOKENS, LAYERS = 64, 4  # a quarter of the blocks is one
WINDOWS = {"half": ROW_TOKENS // 2, "quarter": ROW_TOKENS // 4, "eighth": ROW_TOKENS // 8}
STEPS_PER_TIMING = 4

SCORINGS: dict[str, dict[str, Any]] = {
    "row": {},
    **{name: {"window": tokens} for name, tokens in WINDOWS.items()},
    **{f"{name}_random": {"window": tokens, "window_place": "random"} for name, tokens in WINDOWS.items()},
    "difference": {"derivative": "difference"},
    "top_half": {"parameters": "top_half"},
    "top_quarter": {"parameters": "top_quarter"},
    "half_difference": {"window": WINDOWS["half"], "derivative": "difference"},
    "half_top_half": {"window": WINDOWS["half"], "parameters": "top_half"},
    "quarter_top_quarter": {"window": WINDOWS["quarter"], "parameters": "top_quarter"},
}


@dataclass(frozen=True)
class Mode:
    """A scoring, how often it is done, and whether estimates of groups stand in between."""

    scoring: str = "row"
    every: int = 1
    groups: bool = False


MODES = {name: Mode(name) for name in SCORINGS} | {
    "select_every_5": Mode(every=5),
    "select_every_20": Mode(every=20),
    "half_select_every_5": Mode("half", 5),
    "difference_select_every_5": Mode("difference", 5),
    "feedback_groups_5": Mode(every=5, groups=True),
    "feedback_groups_20": Mode(every=20, groups=True),
}


def main() -> None:
    run_benchmark("scoring_cost", __doc__ or "", measure)


def measure(quick: bool) -> tuple[dict[str, Any], Figures]:
    steps, seeds, pairs = (15, 1, 2) if quick else (100, 3, 6)
    config = _config(max_bytes=400_000, window_steps=5) if quick else _config(max_bytes=4_000_000, window_steps=20)
    parts = build(config)
    scorer = Scorer(parts)  # the seed is no part of what it compiles
    figures: Figures = {}
    for seed in range(seeds):
        print(f"rank agreement: seed {seed}, {steps} steps", file=sys.stderr, flush=True)
        seeded = dataclasses.replace(parts, config=replace(config, run=replace(config.run, seed=seed)))
        for mode, value in agreements(seeded, scorer, steps).items():
            figures.setdefault(f"spearman.{mode}", []).append(value)
    for mode, value in overheads(parts).items():
        figures[f"overhead.{mode}"] = [value]
    for mode, values in time_overheads(parts, scorer, pairs).items():
        figures[f"time_overhead.{mode}"] = values
    setting = {
        "corpus": config.corpus.name,
        "weights": config.corpus.weights,
        "proxy": config.proxy.domains,
        "model": config.model.preset,
        "layers": LAYERS,
        "batch_rows": config.batch.rows,
        "candidates": config.candidates,
        "proxy_rows": config.proxy.rows,
        "row_tokens": config.corpus.row_tokens,
        "learning_rate": config.optimizer.learning_rate,
        "steps": steps,
        "seeds": seeds,
        "timing_pairs": pairs,
        "modes": {name: dataclasses.asdict(mode) | SCORINGS[mode.scoring] for name, mode in MODES.items()},
        "feedback_window_steps": config.feedback.window_steps,
        "method_arms": list(MODES),
    }
    return setting, dict(sorted(figures.items()))


def _config(max_bytes: int, window_steps: int) -> Config:
    mapping = pool(REPORT, "in_pool")
    mapping["corpus"] |= {"max_bytes": max_bytes, "row_tokens": ROW_TOKENS, "proxy_share": 0.1, "validation_share": 0.1}
    mapping["proxy"] |= {"rows": 16}
    return from_mapping(
        mapping
        | {
            "tokenizer": {"vocab_size": 1024},
            "model": {"preset": "tiny", "layers": LAYERS, "dtype": "float32"},
            "optimizer": {"schedule": "constant", "learning_rate": 0.006},
            "batch": {"rows": 16},
            # Infinite temperature: the run trains on random rows, whatever their scores.
            "selection": {"method": "opus", "temperature": float("inf"), "warm_start_steps": 0, "audit_every": 0},
            "feedback": {"enabled": True, "window_steps": window_steps},
        }
    )


def configured(config: Config, mode: Mode) -> Config:
    """The configuration that scores as the mode does."""
    settings = replace(config.selection, select_every=mode.every, **SCORINGS[mode.scoring])
    return replace(config, selection=settings)


# ------------------------------------------------------------------------------------------ rank agreement


def agreements(parts: Parts, scorer: "Scorer", steps: int) -> dict[str, float]:
    """Mean Spearman of every mode over all steps of one run."""
    feedback = {name: GroupEstimates(parts) for name, mode in MODES.items() if mode.groups}
    found: dict[str, list[float]] = {name: [] for name in MODES}
    for step, host, scores in scored_steps(parts, scorer, steps):
        for name, mode in MODES.items():
            used = scores[mode.scoring] if step % mode.every == 0 else None
            if mode.groups:
                used = feedback[name].used(step, host, used)
            found[name].append(0.0 if used is None else spearman(used, scores["row"]))
    return {name: float(np.mean(values)) for name, values in found.items()}


def scored_steps(
    parts: Parts, scorer: "Scorer", steps: int
) -> Iterator[tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(step from 0, the candidate rows, their scores by each scoring) of one run."""
    config = parts.config
    state = init_state(parts.spec, parts.optimizer, config.run.seed, parts.mesh, directed=True)
    candidates = _stream(parts, "train", config.candidates)
    proxies = _stream(parts, "proxy", config.proxy.rows)
    for step in range(steps):
        host, proxy = next(candidates), put_rows(next(proxies), parts.mesh)
        rows = put_rows(host, parts.mesh)
        v = scorer.direction(state, rows, proxy)
        yield step, host, {name: np.asarray(scorer.score(name, state, rows, v)) for name in SCORINGS}
        state, _ = parts.step(state, rows, proxy)


def spearman(scores: np.ndarray, exact: np.ndarray) -> float:
    """Scores that are all alike tell nothing: 0."""
    if np.ptp(scores) == 0 or np.ptp(exact) == 0:
        return 0.0
    return float(spearmanr(scores, exact).statistic)


class GroupEstimates:
    """Scores where there are any, else what is known of a row's documents: from windows up to the last but one."""

    def __init__(self, parts: Parts):
        controller = parts.steering().controller
        assert isinstance(controller, FeedbackState)
        self._state, self._window = controller, parts.config.feedback.window_steps
        self._in_use, self._next = controller, controller

    def used(self, step: int, host: dict[str, np.ndarray], scores: np.ndarray | None) -> np.ndarray:
        used = scores if scores is not None else self._estimates(host)
        if scores is not None:
            self._state = self._state.observe(scores, host["domain_id"], host["document_ids"])
        if (step + 1) % self._window == 0:
            self._state = self._state.close()
            self._in_use, self._next = self._next, self._state
        return used

    def _estimates(self, host: dict[str, np.ndarray]) -> np.ndarray:
        """float64[N]: mean over the row's documents of the finest group's worth."""
        worth, documents = self._in_use.worths()[-1], host["document_ids"]
        unit = self._in_use.groups.members[-1][np.maximum(documents, 0)]
        known = (documents >= 0) & (unit >= 0)
        return np.where(known, worth[unit], 0.0).sum(1) / np.maximum(known.sum(1), 1)


class Scorer:
    """The direction of a step, and utilities along it by every scoring, each a jitted function of its own."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._direction = jax.jit(lambda *given: self._chooser("row", *given).direction(given[0].key)[1])
        self._scores = {name: jax.jit(partial(self._utilities, name)) for name in SCORINGS}

    def direction(self, state: TrainState, candidates: Any, proxy: Any) -> Any:
        with jax.set_mesh(self._parts.mesh):
            return self._direction(state, candidates, proxy)

    def score(self, scoring: str, state: TrainState, candidates: Any, v: Any) -> jax.Array:
        with jax.set_mesh(self._parts.mesh):
            return self._scores[scoring](state, candidates, v)

    def _utilities(self, scoring: str, state: TrainState, candidates: Any, v: Any) -> jax.Array:
        key = jax.random.fold_in(state.key, state.step)
        return self._chooser(scoring, state, candidates, None).score(v, key)

    def _chooser(self, scoring: str, state: TrainState, candidates: Any, proxy: Any) -> Chooser:
        config = configured(self._parts.config, Mode(scoring))
        return Chooser(self._parts.spec, self._parts.optimizer, config, state, candidates, proxy)


def _stream(parts: Parts, split: str, rows: int) -> Iterator[dict[str, np.ndarray]]:
    plan = parts.candidate_plan() if split == "train" else parts.proxy_plan()
    return iter(CandidateStream(parts.reader(split), plan, parts.config.run.seed, every_step(rows)))


# --------------------------------------------------------------------------------------------------- cost


def overheads(parts: Parts) -> dict[str, float]:
    """Selection FLOPs over update FLOPs, of one turn from a scoring to the next."""
    found = {}
    for name, mode in MODES.items():
        config = configured(parts.config, mode)
        costs, buffers = step_costs(parts.spec, config), buffers_of(config)
        turn = range(mode.every, 2 * mode.every)
        found[name] = sum(costs.selection(step, config, buffers) for step in turn) / (costs.update * mode.every)
    return found


def time_overheads(parts: Parts, scorer: Scorer, pairs: int) -> dict[str, list[float]]:
    """time(direction and scores) / time(the step that does not choose), spread over the steps of a turn."""
    plain = _plain_steps(parts)
    measured = {}
    for scoring in SCORINGS:
        scores = _scores(parts, scorer, scoring)
        for run in (plain, scores, plain):
            run()  # the second call of a step still compiles, for donated buffers
        measured[scoring] = alternate(plain, scores, pairs)
    return {name: [x / mode.every for x in measured[mode.scoring]] for name, mode in MODES.items()}


def _plain_steps(parts: Parts) -> Callable[[], None]:
    rows = put_rows(next(_stream(parts, "train", parts.config.batch.rows)), parts.mesh)
    state = init_state(parts.spec, parts.optimizer, 0, parts.mesh, directed=True)

    def run() -> None:
        nonlocal state
        for _ in range(STEPS_PER_TIMING):
            state, metrics = parts.update_step(state, rows, None)
        jax.block_until_ready(metrics)

    return run


def _scores(parts: Parts, scorer: Scorer, scoring: str) -> Callable[[], None]:
    """What a choosing step does before it chooses, as often as `_plain_steps` trains."""
    state = init_state(parts.spec, parts.optimizer, 0, parts.mesh, directed=True)
    candidates = put_rows(next(_stream(parts, "train", parts.config.candidates)), parts.mesh)
    proxy = put_rows(next(_stream(parts, "proxy", parts.config.proxy.rows)), parts.mesh)

    def run() -> None:
        for _ in range(STEPS_PER_TIMING):
            v = scorer.direction(state, candidates, proxy)
            jax.block_until_ready(scorer.score(scoring, state, candidates, v))

    return run


if __name__ == "__main__":
    main()
