"""Online Data Mixing (arXiv 2312.02406), a rival: a bandit over domains whose reward is the loss of the trained rows.

Exp3 with a moving average of importance-weighted rewards: after round t, with exploration rate e_t and G domains,

    R_g = decay R_g + (1 - decay) loss_g / p_g,    p_g = (1 - G e_t) exp(e_{t-1} R_g) / sum + e_t,
    e_t = min(1 / G, sqrt(ln G / (G t)))

It costs no FLOPs, since the losses come with training; it prefers what is still hard to predict, not what helps.
t counts trained batches; rewards are taken at the end of a window, and plans keep the lag of `feedback`. It has the
same face as `FeedbackState`.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int, Num

from opus_jax.config import FeedbackConfig
from opus_jax.selection.feedback import Proposal
from opus_jax.selection.groups import Groups


@dataclass(frozen=True, eq=False)
class BanditState:
    """Rewards so far.

    Attributes:
      base: float64[G], the shares of the first plan; a domain of share 0 is never offered.
      rewards: float64[G], moving averages.
      shares: float64[G], of the plan proposed last.
      window: float64[G, 2], number and sum of the losses of the open window.
      batches: t, how many were seen.
      windows: how many are closed.
    """

    groups: Groups
    settings: FeedbackConfig
    base: np.ndarray
    rewards: np.ndarray
    shares: np.ndarray
    window: np.ndarray
    batches: int = 0
    windows: int = 0

    def observe(
        self,
        scores: Num[np.ndarray, " K"],
        domain_ids: Int[np.ndarray, " K"],
        document_ids: Int[np.ndarray, "K S"] | None = None,
    ) -> "BanditState":
        """Add the losses of a step's trained rows, nats per target token, to the open window."""
        finite = np.isfinite(scores)
        domains, losses = np.asarray(domain_ids)[finite], np.asarray(scores, np.float64)[finite]
        added = [np.bincount(domains, values, len(self.base)) for values in (np.ones(len(losses)), losses)]
        return replace(self, window=self.window + np.stack(added, 1), batches=self.batches + 1)

    def close(self) -> "BanditState":
        """End the window: one round of the bandit, for the domains that were drawn."""
        count, total = self.window.T
        drawn = count > 0
        reward = np.divide(total, count, out=np.zeros(len(count)), where=drawn) / np.maximum(self.shares, 1e-9)
        past = self.settings.decay
        rewards = np.where(drawn, past * self.rewards + (1 - past) * reward, self.rewards)
        return replace(self, rewards=rewards, window=np.zeros_like(self.window), windows=self.windows + 1)

    def propose(self, slots: int) -> tuple["BanditState", Proposal]:
        """Shares for the next `slots` rows, and the state that remembers them."""
        offered = self.base > 0
        domains = int(offered.sum())
        explored, before = _exploration(domains, self.batches), _exploration(domains, self.batches - 1)
        law = np.where(offered, np.exp(before * (self.rewards - self.rewards[offered].max())), 0.0)
        shares = np.where(offered, (1 - domains * explored) * law / law.sum() + explored, 0.0)
        record = {"shares": shares, "base": self.base}
        return replace(self, shares=shares), Proposal(shares, None, record)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a checkpoint; `restored` takes them back."""
        names = ("rewards", "shares", "window")
        counts = {name: np.asarray(getattr(self, name)) for name in ("batches", "windows")}
        return {name: getattr(self, name) for name in names} | counts

    def restored(self, arrays: dict[str, np.ndarray]) -> "BanditState":
        """This state with what a checkpoint holds."""
        return replace(
            self, rewards=arrays["rewards"], shares=arrays["shares"], window=arrays["window"],
            batches=int(arrays["batches"]), windows=int(arrays["windows"]),
        )  # fmt: skip


def start(groups: Groups, base: Num[np.ndarray, " G"], settings: FeedbackConfig) -> BanditState:
    """A bandit that has seen nothing, with the first plan's shares of the domains."""
    base = np.asarray(base, np.float64) / np.sum(base)
    return BanditState(groups, settings, base, np.zeros(len(base)), base, np.zeros((len(base), 2)))


def _exploration(domains: int, batches: int) -> float:
    """e_t: the least share of a domain after t batches."""
    return min(1 / domains, (np.log(domains) / (domains * max(batches, 1))) ** 0.5)
