"""Settings of scoring that keep within a budget: `selection.max_overhead`.

`POINTS` are ways to score with the rank agreement that `benchmarks/overhead_frontier.py` measured for them; what each
costs is computed for the run's own model, rows and batch, and the best that the budget allows is taken.
"""

import math
from dataclasses import dataclass
from typing import Any

from opus_jax.config import Config, dotted, replace
from opus_jax.errors import ConfigError
from opus_jax.models.presets import ModelSpec
from opus_jax.training.costs import step_costs
from opus_jax.training.overhead_points import POINTS, Point

LEFT_ALONE = {
    "selection.window": None, "selection.window_place": "prefix", "selection.derivative": "jvp",
    "selection.parameters": "all", "selection.select_every": 1, "proxy.refresh": 1, "proxy.window": None,
    "proxy.ema": 0.0,
}  # fmt: skip
"""The keys that a budget decides, and their defaults."""


@dataclass(frozen=True)
class Pick:
    """A point, as settings of a run, and what it costs there: FLOPs over those of plain training on the same rows."""

    point: Point
    config: Config
    overhead: float

    @property
    def settings(self) -> dict[str, Any]:
        """The decided keys with their values."""
        return _decided(self.config)


def within_budget(spec: ModelSpec, config: Config) -> Config:
    """The configuration with the keys decided that `selection.max_overhead` decides; unchanged where it is null.

    A configuration that comes from here, such as a run folder's, is left as it is.

    Raises:
      ConfigError: a decided key is set by hand too, or no point fits.
    """
    return config if config.selection.max_overhead is None else pick(spec, config).config


def pick(spec: ModelSpec, config: Config) -> Pick:
    """The point of the highest measured agreement whose overhead, in this run, is within the budget.

    Raises:
      ConfigError: as `within_budget`.
    """
    budget = config.selection.max_overhead
    assert budget is not None, "asked only where there is a budget"
    feedback = config.feedback.enabled
    picks = [Pick(point, fitted := _fitted(config, point), overhead(spec, fitted)) for point in POINTS]
    fitting = [x for x in picks if x.overhead <= budget]
    if not fitting:
        least = min(x.overhead for x in picks)
        allowed = f"the cheapest scoring costs {least:.4f} of training with this model and batch: raise it to that"
        raise ConfigError("selection.max_overhead", budget, f"{allowed}, or selection.method=random for none")
    best = max(fitting, key=lambda x: (x.point.agreement(feedback=feedback), -x.overhead))
    _refuse_decided(config, best)
    return best


def overhead(spec: ModelSpec, config: Config) -> float:
    """FLOPs of selection over those of the updates, of all steps after the warm start."""
    costs, settings = step_costs(spec, config), config.selection
    steps = config.run.steps - settings.warm_start_steps
    if steps <= 0:
        return 0.0
    scored = math.ceil(steps / settings.select_every)
    refreshed = math.ceil(scored / config.proxy.refresh)
    reference = costs.update if settings.warm_start_steps == 0 else 0
    chosen = scored * (costs.direction + costs.scoring + costs.redundancy)
    return (chosen + refreshed * costs.proxy + reference) / (steps * costs.update)


def describe(spec: ModelSpec, config: Config) -> dict[str, Any]:
    """What was picked, for the log and summary.json: the decided keys, overhead and measured agreement."""
    found = pick(spec, config)
    agreement = found.point.agreement(feedback=config.feedback.enabled)
    return found.settings | {"overhead": found.overhead, "measured_agreement": agreement}


def _fitted(config: Config, point: Point) -> Config:
    selection = replace(
        config.selection,
        window=_first(config, point.part),
        window_place="prefix",
        derivative=point.derivative,
        parameters=point.parameters,
        select_every=point.select_every,
    )
    proxy = replace(config.proxy, refresh=point.refresh, window=_first(config, point.proxy_part), ema=point.ema)
    return replace(config, selection=selection, proxy=proxy)


def _first(config: Config, part: int) -> int | None:
    """Tokens of a window that is this part of a row; None = the whole row."""
    return None if part == 1 else max(config.corpus.row_tokens // part, 2)


def _refuse_decided(config: Config, best: Pick) -> None:
    given = _decided(config)
    if given == best.settings:
        return
    for key, value in given.items():
        if value != LEFT_ALONE[key]:
            allowed = "selection.max_overhead decides this key: leave it out, or set selection.max_overhead=null"
            raise ConfigError(key, value, allowed)


def _decided(config: Config) -> dict[str, Any]:
    values = dotted(config.to_mapping())
    return {key: values[key] for key in LEFT_ALONE}
