"""Ways to score a row that cost less than the whole row's exact utility, and what each costs.

A forward pass is causal, so the utilities of a row's tokens, summed over its first tokens only, are those of a prefix
window: one pass over the longest window gives every shorter one. Likewise pieces of a row, scored apart, give every
sparser choice of them.
"""

from dataclasses import dataclass
from typing import Any

from opus_jax.config import Config, replace
from opus_jax.models.presets import ModelSpec
from opus_jax.training.costs import step_costs

CANDIDATES, BATCH_ROWS, PROXY_ROWS = 64, 32, 8  # of the run whose overhead is counted: N, K = N / 2, K_proxy

WINDOWS = {1: "row", 2: "half", 4: "quarter", 8: "eighth", 12: "twelfth", 16: "sixteenth", 32: "thirtysecond"}


@dataclass(frozen=True)
class Proxy:
    """Which gradient of the proxy loss is in use.

    Attributes:
      period: steps between fresh ones, each on new rows.
      ema: weight of the past at each renewal.
      part: it is taken over this part of each proxy row: 4 = the first quarter.
    """

    period: int = 1
    ema: float = 0.0
    part: int = 1

    @property
    def name(self) -> str:
        renewed = f"refresh{self.period}" if self.period > 1 else ""
        short = f"proxy{self.part}th" if self.part > 1 else ""
        return "_".join(filter(None, (renewed, f"ema{self.ema:g}" if self.ema else "", short)))


FRESH = Proxy()


@dataclass(frozen=True)
class Scorer:
    """One way to score.

    Attributes:
      part: the window is this part of the row's tokens: 4 = a quarter.
      pieces: 1, or so many windows spread evenly over the row, each scored as a row of its own.
      place, derivative, parameters, rank, dtype: as in `selection`.
      proxy: the gradient in use.
    """

    part: int = 1
    pieces: int = 1
    place: str = "prefix"
    derivative: str = "jvp"
    parameters: str = "all"
    rank: int | None = None
    dtype: str | None = None
    proxy: Proxy = FRESH

    @property
    def name(self) -> str:
        """What differs from the whole row's exact score."""
        window = WINDOWS.get(self.part, f"part{self.part}")
        parts = (
            f"{self.pieces}x{self.part}th" if self.pieces > 1 else window,
            "random" if self.place == "random" else "",
            "difference" if self.derivative == "difference" else "",
            self.parameters if self.parameters != "all" else "",
            f"rank{self.rank}" if self.rank else "",
            self.dtype or "",
            self.proxy.name,
        )
        return "_".join(filter(None, parts))

    def __lt__(self, other: "Scorer") -> bool:
        """JAX sorts the keys of a dictionary."""
        return self.name < other.name

    def settings(self, row_tokens: int) -> dict[str, Any]:
        """Keys of `selection`; for several pieces, those of one piece."""
        return {
            "window": None if self.part == 1 else row_tokens // self.part,
            "window_place": self.place, "derivative": self.derivative, "parameters": self.parameters,
            "rank": self.rank, "dtype": self.dtype,
        }  # fmt: skip


def counted(config: Config, row_tokens: int) -> Config:
    """The configuration with the batch whose overhead is counted."""
    return replace(
        config,
        corpus=replace(config.corpus, row_tokens=row_tokens),
        batch=replace(config.batch, rows=BATCH_ROWS),
        selection=replace(config.selection, ratio=BATCH_ROWS / CANDIDATES),
        proxy=replace(config.proxy, rows=PROXY_ROWS),
    )


def overhead(spec: ModelSpec, config: Config, scorer: Scorer, every: int) -> float:
    """FLOPs of scoring, proxy and direction over those of the update, for scores at every `every`-th step.

    Args:
      config: a `counted` one.

    Raises:
      ValueError: the proxy's period is no multiple of `every`: it is renewed when something is scored.
    """
    renewals = scorer.proxy.period // every if scorer.proxy.period > 1 else 1
    if scorer.proxy.period > 1 and scorer.proxy.period % every:
        raise ValueError(f"a proxy renewed every {scorer.proxy.period} steps cannot be used every {every}")
    tokens, part = config.corpus.row_tokens, scorer.proxy.part
    settings = replace(config.selection, **scorer.settings(tokens))
    proxy = replace(config.proxy, window=None if part == 1 else tokens // part)
    costs = step_costs(spec, replace(config, selection=settings, proxy=proxy))
    return (costs.scoring * scorer.pieces + costs.direction + costs.proxy / renewals) / (every * costs.update)
