"""From recorded scores to settings with their figures, and which of them nothing else beats."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.frontier.scorers import FRESH, Scorer, counted, overhead
from benchmarks.frontier.settings import Setting, mean_agreement
from benchmarks.frontier.tape import EXACT, LONG, PROXIES, SHORT, SPREADS, WHOLE, Moment
from opus_jax.config import Config
from opus_jax.models.presets import ModelSpec
from opus_jax.selection.feedback import FeedbackState

RHYTHMS = (1, 2, 4, 5, 10, 20)
PRIOR_WEIGHTS = (0.25, 0.5, 0.75)
MOST = 0.3  # what no run can do and costs more is not measured


@dataclass(frozen=True)
class Figure:
    """A setting, its overheads (FLOPs over training's) and its agreement with exact scores, by seed."""

    setting: Setting
    overhead: float
    overhead_gpt2_xl: float
    spearman: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.spearman))

    @property
    def for_gpt2_xl(self) -> "Figure":
        """GPT-2 XL's overhead in the measured model's place."""
        return replace(self, overhead=self.overhead_gpt2_xl)


def every_setting(factors: Sequence[Scorer]) -> list[Setting]:
    """All that is compared: cheap scorers at every rhythm, with and without estimates of groups."""
    found = [x for scorer in _cheap_scorers() for x in _settings(scorer)]
    if WHOLE in factors:
        found += [Setting(WHOLE, every, groups) for every in (5, 10, 20) for groups in (False, True)]
    return list(dict.fromkeys([*found, *lines(factors)]))


def lines(factors: Sequence[Scorer]) -> list[Setting]:
    """One thing changed at a time, around the first quarter of the row, jvp, a fresh proxy, at every step."""
    quarter = Scorer(4)
    scorers = [
        *(Scorer(part) for part in LONG),
        *factors,
        *(Scorer(4, derivative="difference", proxy=proxy) for proxy in PROXIES),
        *(Scorer(part, pieces, derivative="difference") for part, pieces in SPREADS),
    ]
    rare = [(every, groups) for every in RHYTHMS[1:] for groups in (False, True)]
    found = [Setting(scorer) for scorer in scorers]
    return found + [Setting(scorer, *rhythm) for scorer in (EXACT, quarter) for rhythm in rare]


def _cheap_scorers() -> list[Scorer]:
    found = [Scorer(part) for part in LONG]
    for proxy in PROXIES:
        found += [Scorer(part, derivative="difference", proxy=proxy) for part in SHORT]
        for part, most in SPREADS:
            pieces = [most >> i for i in range(most.bit_length() - 1)]
            found += [Scorer(part, n, derivative="difference", proxy=proxy) for n in pieces]
    return found


def _settings(scorer: Scorer) -> Iterator[Setting]:
    for every in _fitting(scorer):
        yield Setting(scorer, every)
        if every > 1:
            yield Setting(scorer, every, groups=True)
        for weight in PRIOR_WEIGHTS:
            yield Setting(scorer, every, prior=weight)


def _fitting(scorer: Scorer) -> list[int]:
    """A proxy that is kept over several scorings is renewed at one of them."""
    period = scorer.proxy.period
    if scorer.proxy == FRESH:
        return list(RHYTHMS)
    return [every for every in RHYTHMS if every == 1 or (period % every == 0 and period > every)]


def measured_figures(
    spec: ModelSpec,
    large: ModelSpec,
    config: Config,
    factors: Sequence[Scorer],
    runs: Sequence[Sequence[Moment]],
    start: FeedbackState,
) -> list[Figure]:
    """Overheads and agreements of every setting, but of those that no run can do only up to `MOST`.

    Args:
      spec, large: the measured model, and GPT-2 XL.
      config: of the run; the counted batch takes its batch's place.
      factors: scorers that are measured now and then.
      runs: the moments of every run.
      start: what is known of the groups before the first moment.
    """
    of_run, window = counted(config, config.corpus.row_tokens), config.feedback.window_steps
    in_lines, found = set(lines(factors)), []
    for setting in every_setting(factors):
        costs = [overhead(model, of_run, setting.scorer, setting.every) for model in (spec, large)]
        is_new = setting.prior is not None or setting.scorer.pieces > 1
        if costs[0] <= MOST or not is_new or setting in in_lines:
            agreement = tuple(mean_agreement(setting, moments, start, window) for moments in runs)
            found.append(Figure(setting, *costs, agreement))
    return found


def best(figures: Iterable[Figure], allowed: Callable[[Figure], bool]) -> Figure:
    """The figure of the highest agreement among those allowed."""
    return max((x for x in figures if allowed(x)), key=lambda x: x.mean)


def non_dominated(figures: Iterable[Figure]) -> list[Figure]:
    """Those for which none costs as little and agrees better, the cheapest first."""
    found: list[Figure] = []
    for figure in sorted(figures, key=lambda x: (x.overhead, -x.mean)):
        if not found or figure.mean > found[-1].mean:
            found.append(figure)
    return found
