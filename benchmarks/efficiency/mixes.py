"""Pools of text: half of each is off-target, the rest is the target and what is related to it.

`in_pool`: the target is an eighth of the pool. `absent`: none of it, so only its proxy and validation text exist.
`clean`: like `in_pool`, without noise. In the first two, a tenth of every domain's training documents is corrupted.
"""

from dataclasses import dataclass
from typing import Any

SETTINGS = ("in_pool", "absent", "clean")
TARGET_SHARE = 1 / 8
NOISE_SHARE = 0.1
PROXY_ROWS = 96  # all the target text that anyone has: a few percent of what a run trains on
NOISE = ("shuffle", "characters", "repetition", "boilerplate")  # dealt to the domains in turn


@dataclass(frozen=True)
class Mix:
    """Domains of `debian` and what they are to the target."""

    name: str
    target: str
    related: tuple[str, ...]
    off_target: tuple[str, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        return (self.target, *self.related, *self.off_target)

    def weights(self, setting: str) -> dict[str, float]:
        """Shares of the candidates, their sum 1; a domain that is left out gets nothing."""
        target = 0.0 if setting == "absent" else TARGET_SHARE
        shares = {self.target: target}
        shares |= {name: (0.5 - target) / len(self.related) for name in self.related}
        return shares | {name: 0.5 / len(self.off_target) for name in self.off_target}

    def oracle_weights(self, setting: str, target_share: float) -> dict[str, float]:
        """Set by hand, with knowledge of the domains: nothing off-target."""
        target = 0.0 if setting == "absent" else target_share
        return {self.target: target} | {name: (1 - target) / len(self.related) for name in self.related}


REPORT = Mix(
    "report",
    "python-docs",
    ("kernel-docs", "databases", "python-code"),
    ("fiction", "scripture", "commentary", "politics", "dictionary", "glosses", "biology", "legal"),
)
DEVELOPMENT = Mix(
    "development",
    "commentary",
    ("scripture", "politics", "fiction"),
    ("python-code", "databases", "biology", "legal", "dictionary", "glosses", "kernel-docs"),
)
MIXES = {mix.name: mix for mix in (REPORT, DEVELOPMENT)}
ALL_DOMAINS = tuple(sorted({*REPORT.domains, *DEVELOPMENT.domains}))  # prepared once, for both mixes


def pool(mix: Mix, setting: str, target_share: float | None = None) -> dict[str, Any]:
    """Corpus and proxy sections of a run's configuration; `target_share` makes it the oracle's."""
    weights = mix.weights(setting) if target_share is None else mix.oracle_weights(setting, target_share)
    noise = {name: f"{NOISE[i % len(NOISE)]}:{NOISE_SHARE}" for i, name in enumerate(ALL_DOMAINS)}
    return {
        "corpus": {
            "name": "debian",
            "domains": list(ALL_DOMAINS),
            "weights": weights,
            "noise": {} if setting == "clean" else noise,
        },
        "proxy": {"domains": [mix.target], "limit": PROXY_ROWS},
    }
