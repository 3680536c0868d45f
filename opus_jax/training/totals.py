"""Running totals of a run: they live in the checkpoint, so that a resumed run counts on from where it was."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opus_jax.training import digest


@dataclass
class Totals:
    """Sums over all steps so far; the digests are hashes over losses and over the ids of the update rows."""

    update_tokens: int = 0
    seen_tokens: int = 0
    update_flops: int = 0
    selection_flops: int = 0  # scoring + proxy + direction + redundancy
    audit_flops: int = 0
    wall_seconds: float = 0.0
    timed_tokens: int = 0  # update tokens of the steps counted in timed_seconds
    timed_seconds: float = 0.0  # steps only: without compilation, evaluation and saving
    offered: list[int] = field(default_factory=list)  # candidate rows by domain
    selected: list[int] = field(default_factory=list)  # update rows by domain
    skipped_updates: int = 0  # steps without an update, because loss or gradient was not finite
    unreadable_rows: int = 0  # candidate rows whose record could not be read
    loss_digest: str = digest.EMPTY
    batch_digest: str = digest.EMPTY
    bits_per_byte: dict[str, float] = field(default_factory=dict)  # last evaluation, by domain
    target_bits_per_byte: float | None = None
    goodput: dict[str, float] = field(default_factory=dict)  # seconds of all attempts, by category (goodput.py)
    attempts: int = 0  # starts of this run that the seconds are of
    stamped: float = 0.0  # when the seconds were brought up to date; seconds since 1970

    @staticmethod
    def start(domains: int) -> "Totals":
        return Totals(offered=[0] * domains, selected=[0] * domains)

    @property
    def flops(self) -> int:
        return self.update_flops + self.selection_flops + self.audit_flops

    @property
    def scoring_overhead(self) -> float:
        """Scoring, proxy and direction FLOPs over the FLOPs of plain training on the same update rows."""
        return self.selection_flops / max(self.update_flops, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0

    def selected_share(self, domains: list[str]) -> dict[str, float]:
        total = max(sum(self.selected), 1)
        return {name: count / total for name, count in zip(domains, self.selected, strict=True)}

    def count_rows(self, domain_id: np.ndarray, selected: np.ndarray) -> None:
        """Add one step's candidate rows; both arrays are [N]."""
        width = len(self.offered)
        self.offered = [a + int(b) for a, b in zip(self.offered, np.bincount(domain_id, minlength=width), strict=True)]
        chosen = np.bincount(domain_id[selected], minlength=width)
        self.selected = [a + int(b) for a, b in zip(self.selected, chosen, strict=True)]

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_mapping(mapping: dict[str, Any]) -> "Totals":
        return Totals(**mapping)
