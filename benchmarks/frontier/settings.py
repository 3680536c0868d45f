"""A scorer, how often it is used, and what stands in where it is not: the settings that are compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import spearmanr

from benchmarks.frontier.scorers import Scorer
from benchmarks.frontier.tape import EXACT, Moment
from opus_jax.selection.feedback import Buffer, FeedbackState, standardised

PRIOR_DECAY = 0.99  # weight of earlier steps, per step, in estimates that are renewed at every step


@dataclass(frozen=True)
class Setting:
    """What a run would do.

    Attributes:
      every: steps from one scoring to the next.
      groups: at the others, the estimates of the rows' groups stand in, as plans have them (`feedback`).
      prior: scores are averaged with the estimates of the rows' groups, which are renewed at every step; this is the
        weight of the score. None = scores as they are.
    """

    scorer: Scorer
    every: int = 1
    groups: bool = False
    prior: float | None = None

    @property
    def name(self) -> str:
        parts = (
            self.scorer.name,
            f"every{self.every}" if self.every > 1 else "",
            "groups" if self.groups else "",
            f"prior{self.prior:g}" if self.prior is not None else "",
        )
        return "_".join(filter(None, parts))


def mean_agreement(setting: Setting, moments: Sequence[Moment], start: FeedbackState, window: int) -> float:
    """Mean Spearman of the scores as used with the exact ones, over the moments at which the setting is known.

    Args:
      start: what is known of the groups before the first moment.
      window: steps of a plan.
    """
    return float(np.mean(list(_agreement(setting, moments, start, window))))


def _agreement(setting: Setting, moments: Sequence[Moment], start: FeedbackState, window: int) -> Iterator[float]:
    known = Prior(start, setting.prior) if setting.prior is not None else Plans(start, window)
    for step, moment in enumerate(moments):
        scored = step % setting.every == 0
        if scored and setting.scorer not in moment.scores:
            continue  # a factor, which is measured now and then
        scores = moment.scores[setting.scorer] if scored else None
        used = known.used(step, moment, scores)
        if scores is None and not setting.groups and setting.prior is None:
            used = np.zeros(len(used))
        yield spearman(used, moment.scores[EXACT])


def spearman(scores: np.ndarray, exact: np.ndarray) -> float:
    """Scores that are all alike tell nothing: 0."""
    if np.ptp(scores) == 0 or np.ptp(exact) == 0:
        return 0.0
    return float(spearmanr(scores, exact).statistic)


class Plans:
    """Scores where there are any, else what the plan in force knows: of windows up to the last but one."""

    def __init__(self, start: FeedbackState, window: int):
        self._state, self._window = start, window
        self._in_use = self._next = start.worths()

    def used(self, step: int, moment: Moment, scores: np.ndarray | None) -> np.ndarray:
        used = estimates(self._state, self._in_use, moment) if scores is None else scores
        if scores is not None:
            self._state = self._state.observe(scores, moment.domains, moment.documents)
        if (step + 1) % self._window == 0:
            self._state = self._state.close()
            self._in_use, self._next = self._next, self._state.worths()
        return used


class Prior:
    """Scores drawn towards the estimates of the rows' groups, out of the scores of all earlier steps."""

    def __init__(self, start: FeedbackState, weight: float):
        self._state = replace(start, settings=replace(start.settings, decay=PRIOR_DECAY))
        self._weight = weight

    def used(self, step: int, moment: Moment, scores: np.ndarray | None) -> np.ndarray:
        del step
        worths = self._state.worths()
        prior = estimates(self._state, worths, moment)
        if scores is None:
            return prior
        z = standardised(Buffer(scores, moment.domains, moment.documents), worths[0])
        self._state = self._state.observe(scores, moment.domains, moment.documents).close()
        return prior + self._weight * (z - prior)


def estimates(state: FeedbackState, worths: list[np.ndarray], moment: Moment) -> np.ndarray:
    """float64[N]: mean over a row's documents of their groups' worths."""
    unit = state.groups.members[-1][np.maximum(moment.documents, 0)]
    known = (moment.documents >= 0) & (unit >= 0)
    return np.where(known, worths[-1][unit], 0.0).sum(1) / np.maximum(known.sum(1), 1)
