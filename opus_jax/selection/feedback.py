"""Scores seen so far become the sampling weights of the next plan.

A row's score is taken to be, up to the scale and offset of its buffer, the worth of the row's groups plus noise.
Worths are means over past windows, each shrunk towards its parent's (domain, cluster within it, document within that):

    m_g = (sum of scores + shrinkage * m_parent) / (number of scores + shrinkage)

(the shrinkage estimated from how far groups differ, unless set),

and the next plan is the Boltzmann law over rows with these worths, p(row) ~ base(row) exp(m / temperature), with a
least share of every domain, a least share of every row within its domain, and a limit on how often a row may come.

    state = start(domain_groups([1000, 500, 20]))
    state, plan = update(state, utilities, domain_ids)  # the plan for what comes next
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from opus_jax.config import FeedbackConfig
from opus_jax.data.plan import Plan
from opus_jax.errors import ConfigError
from opus_jax.selection.groups import Groups, domain_groups

ROW_FLOOR = 0.1  # share of a domain's slots that go to its rows alike, so that no document is ever given up
CLIP = 4.0  # standardised scores beyond this count as this: a few rows of a buffer can be far out


@dataclass(frozen=True)
class Proposal:
    """What the next plan shall be: domain weights float64[G], priorities float32[documents] or None, and a record."""

    weights: np.ndarray
    priorities: np.ndarray | None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Buffer:
    """The scores of one buffer: finite or not, float64[N]; domains int64[N]; documents int64[N, S], -1 = none."""

    scores: np.ndarray
    domains: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True, eq=False)
class FeedbackState:
    """What is known of the groups.

    Attributes:
      base: float64[U], the shares of the first plan; what has none is never offered.
      sums: for each level float64[groups, 4] over the scores of closed windows: their weights, which decay, weighted
        sum and sum of squares, and the weights' squares.
      exposure: float64[U], passes over each unit that plans have asked for.
      window: buffers of the open window.
      windows: how many are closed.
    """

    groups: Groups
    settings: FeedbackConfig
    base: np.ndarray
    sums: tuple[np.ndarray, ...]
    exposure: np.ndarray
    window: tuple[Buffer, ...] = ()
    windows: int = 0

    def observe(
        self,
        scores: Num[np.ndarray, " N"],
        domain_ids: Int[np.ndarray, " N"],
        document_ids: Int[np.ndarray, "N S"] | None = None,
    ) -> "FeedbackState":
        """Add a buffer's scores to the open window."""
        scores, domains = np.asarray(scores, np.float64), np.asarray(domain_ids, np.int64)
        if self.settings.shuffle:
            scores = np.random.default_rng([self.windows, len(self.window)]).permutation(scores)
        nothing = np.full((len(scores), 1), -1, np.int64)
        documents = nothing if document_ids is None else np.asarray(document_ids, np.int64)
        return replace(self, window=(*self.window, Buffer(scores, domains, documents)))

    def close(self) -> "FeedbackState":
        """End the window: its scores join those of earlier ones, which lose weight."""
        decay = self.settings.decay
        sums = [past * np.array([decay, decay, decay, decay**2]) for past in self.sums]
        worth = self.worths()[0]
        for buffer in self.window:
            z = standardised(buffer, worth)
            kept = np.isfinite(z)
            _add(sums[0], buffer.domains[kept], z[kept], np.ones(kept.sum()))
            for level, members in enumerate(self.groups.members, 1):
                group, row, weight = _memberships(members, buffer.documents[kept])
                _add(sums[level], group, z[kept][row], weight)
        return replace(self, sums=tuple(sums), window=(), windows=self.windows + 1)

    def worths(self) -> list[np.ndarray]:
        """For each level float64[groups]: the shrunk means, in units of the spread within a domain."""
        found: list[np.ndarray] = []
        for sums, parents in zip(self.sums, self.groups.parents, strict=True):
            parent = found[-1][parents] if found else np.zeros(len(sums))
            shrinkage = self.settings.shrinkage
            shrinkage = estimated_shrinkage(sums, parent) if shrinkage is None else max(shrinkage, 1e-9)
            count, mean = effective_counts(sums), parent.copy()
            np.divide(sums[:, 1], sums[:, 0], out=mean, where=count > 0)
            share = np.divide(count, count + shrinkage, out=np.zeros(len(count)), where=count > 0)
            found.append(share * mean + (1 - share) * parent)
        return found

    def propose(self, slots: int) -> tuple["FeedbackState", Proposal]:
        """The law of the next `slots` rows of the stream, and the state that has counted them.

        Nothing but closed windows counts. What a cap on passes takes from a group goes to the others in proportion.
        """
        worths = np.where(self.base > 0, self.worths()[-1], -np.inf)
        wanted = self.base * np.exp((worths - worths.max()) / self.settings.temperature)
        wanted = self._with_floors(wanted / wanted.sum())
        shares = water_fill(wanted, self._capacity(slots))
        rows = np.maximum(self.groups.unit_rows, 1e-9)
        state = replace(self, exposure=self.exposure + shares * slots / rows)
        weights = self._by_domain(shares)
        priorities, units = None, self.groups.unit_of_document
        if units is not None:
            density = (shares / rows).astype(np.float32)
            priorities = np.where(units >= 0, density[np.maximum(units, 0)], 0).astype(np.float32)
        return state, Proposal(weights, priorities, {"shares": shares, "base": self.base})

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a checkpoint; `restored` takes them back."""
        arrays = {f"sums{level}": sums for level, sums in enumerate(self.sums)}
        arrays |= {"exposure": self.exposure, "windows": np.asarray(self.windows)}
        for i, buffer in enumerate(self.window):
            arrays |= {f"scores{i}": buffer.scores, f"domains{i}": buffer.domains, f"documents{i}": buffer.documents}
        return arrays

    def restored(self, arrays: dict[str, np.ndarray]) -> "FeedbackState":
        """This state with what a checkpoint holds; groups, base and settings are made anew from the run."""
        count = sum(name.startswith("scores") for name in arrays)
        window = tuple(
            Buffer(*(arrays[f"{kind}{i}"] for kind in ("scores", "domains", "documents"))) for i in range(count)
        )
        sums = tuple(arrays[f"sums{level}"] for level in range(len(self.sums)))
        return replace(self, sums=sums, exposure=arrays["exposure"], window=window, windows=int(arrays["windows"]))

    def _by_domain(self, shares: np.ndarray) -> np.ndarray:
        return np.bincount(self.groups.unit_domain, shares, self.groups.sizes[0])

    def _with_floors(self, shares: np.ndarray) -> np.ndarray:
        domain, base, of_domain = self.groups.unit_domain, self._by_domain(self.base), self._by_domain(shares)
        offered = base > 0
        floor = self.settings.floor
        raised = np.where(offered, floor + (1 - floor * offered.sum()) * of_domain, 0.0)
        chosen = np.divide(shares, of_domain[domain], out=np.zeros(len(shares)), where=of_domain[domain] > 0)
        alike = np.divide(self.base, base[domain], out=np.zeros(len(shares)), where=base[domain] > 0)
        return raised[domain] * ((1 - ROW_FLOOR) * chosen + ROW_FLOOR * alike)

    def _capacity(self, slots: int) -> np.ndarray:
        """float64[U]: the largest share each unit can have before its rows came `max_epochs` times."""
        if self.settings.max_epochs is None:
            return np.full(len(self.exposure), np.inf)
        return self.groups.unit_rows * np.maximum(self.settings.max_epochs - self.exposure, 0) / slots


def start(
    groups: Groups | int,
    base: Num[np.ndarray, " G"] | None = None,
    settings: FeedbackConfig | None = None,
    priorities: Num[np.ndarray, " documents"] | None = None,
) -> FeedbackState:
    """A state that has seen nothing.

    Args:
      groups: see `groups.py`; a number G stands for G domains of unknown size, without a limit on passes.
      base: shares of the domains to begin with; None = by their rows.
      settings: temperature, shrinkage, decay, floor, max_epochs, shuffle are used.
      priorities: by document, within the domains, to begin with; None = all alike. Documents of priority 0 stay out.

    Raises:
      ConfigError: the floor is above 1 / domains offered.
      UserError: a domain is to be offered and has no rows.
    """
    settings = settings or FeedbackConfig()
    if isinstance(groups, int):
        groups, settings = domain_groups(np.ones(groups)), replace(settings, max_epochs=None)
    domains = groups.sizes[0]
    rows = np.bincount(groups.unit_domain, groups.unit_rows, domains)
    base = rows if base is None else np.asarray(base, np.float64)
    _require_rows(base, rows)
    offered = int((base > 0).sum())
    if settings.floor * offered > 1:
        raise ConfigError(
            "feedback.floor", settings.floor, f"must be at most 1 / {offered} domains = {1 / offered:.4g}"
        )
    sums = tuple(np.zeros((size, 4)) for size in groups.sizes)
    shares = groups.unit_shares(base / base.sum(), priorities)
    return FeedbackState(groups, settings, shares, sums, np.zeros(len(groups.unit_rows)))


def update(
    state: FeedbackState,
    utilities: Num[np.ndarray, " N"],
    domain_ids: Int[np.ndarray, " N"],
    document_ids: Int[np.ndarray, "N S"] | None = None,
    *,
    slots: int = 1,
) -> tuple[FeedbackState, Plan]:
    """Take a buffer's utilities in as one window, and give the plan for what comes next.

    Args:
      utilities: [N], higher is better, any scale; values that are not finite are left out.
      domain_ids: [N], 0 to G - 1.
      document_ids: [N, S], for groups finer than domains.
      slots: rows that will be drawn by this plan; matters for `max_epochs` only.

    Returns:
      (state, plan with domain_weights and priorities, for `opus_jax.candidates` or `opus_jax.advance`).
    """
    state, proposal = state.observe(utilities, domain_ids, document_ids).close().propose(slots)
    return state, Plan(proposal.weights, proposal.priorities)


def standardised(buffer: Buffer, worths: Float[np.ndarray, " G"]) -> Float[np.ndarray, " N"]:
    """float64[N]: scores over the spread within domains, less the offset that fits the known worths of the domains.

    Neither changes with what the stream happens to offer, as a plain z-score would: in a buffer that holds little
    but good rows, good rows are still good. NaN for what is not finite, and for all of a buffer without spread.
    """
    finite = np.isfinite(buffer.scores)
    scores, domains = buffer.scores[finite], buffer.domains[finite]
    z = np.full(len(buffer.scores), np.nan)
    if len(scores) < 2:
        return z
    counts = np.bincount(domains, minlength=len(worths))
    means = np.bincount(domains, scores, len(worths)) / np.maximum(counts, 1)
    freedom = len(scores) - (counts > 0).sum()
    spread = np.sqrt(((scores - means[domains]) ** 2).sum() / freedom) if freedom > 0 else scores.std()
    if not spread > 1e-12 * np.abs(scores).max():
        return z
    scaled = scores / spread
    z[finite] = np.clip(scaled - (scaled - worths[domains]).mean(), -CLIP, CLIP)
    return z


def effective_counts(sums: Float[np.ndarray, "g 4"]) -> Float[np.ndarray, " g"]:
    """How many scores of equal weight would tell as much as the decayed ones: (sum of weights)^2 / sum of squares."""
    return np.divide(sums[:, 0] ** 2, sums[:, 3], out=np.zeros(len(sums)), where=sums[:, 3] > 0)


def estimated_shrinkage(sums: Float[np.ndarray, "g 4"], parent: Float[np.ndarray, " g"]) -> float:
    """How many scores the parent's worth counts for: variance of scores within groups over that of groups' worths.

    The worths' variance is what the means vary by, around the parents, beyond what their scores' spread explains (the
    moment estimate of DerSimonian and Laird). Where that is nothing, groups are not told apart and the parent counts
    for everything.
    """
    count = effective_counts(sums)
    seen = count > 1
    weight, mean = sums[seen, 0], sums[seen, 1] / np.maximum(sums[seen, 0], 1e-300)
    freedom = (weight * (1 - 1 / count[seen])).sum()
    if seen.sum() < 2 or freedom <= 0:
        return np.inf
    within = (sums[seen, 2] - weight * mean**2).sum() / freedom
    between = ((weight * (mean - parent[seen]) ** 2).sum() - within * (weight / count[seen]).sum()) / weight.sum()
    return float(within / between) if between > 0 else np.inf


def water_fill(shares: Float[np.ndarray, " U"], capacity: Float[np.ndarray, " U"]) -> Float[np.ndarray, " U"]:
    """min(level * shares, capacity) with the level at which the result sums to 1; capacity alone where it cannot."""
    if capacity.sum() <= 1:
        return capacity / max(capacity.sum(), 1e-300)
    ratio = np.divide(capacity, shares, out=np.full(len(shares), np.inf), where=shares > 0)
    order = np.argsort(ratio, kind="stable")
    full = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(capacity), capacity, 0.0)[order])])
    left = np.concatenate([np.cumsum(shares[order][::-1])[::-1], [0.0]])
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = (1 - full) / left  # if exactly the first i of the order are full
    fits = np.concatenate([ratio[order], [np.inf]]) >= levels * (1 - 1e-12)
    level = levels[np.flatnonzero(fits & (left > 0) & (levels > 0))[0]]
    return np.minimum(np.where(shares > 0, level * shares, 0.0), capacity)


def standard_errors(sums: Float[np.ndarray, "g 4"]) -> Float[np.ndarray, " g"]:
    """Of the means of scores; NaN where fewer than two were seen."""
    count = effective_counts(sums)
    count = np.where(count >= 2, count, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.maximum(sums[:, 2] / sums[:, 0] - (sums[:, 1] / sums[:, 0]) ** 2, 0)
    return np.sqrt(variance / (count - 1))


def _require_rows(base: np.ndarray, rows: np.ndarray) -> None:
    for domain in np.flatnonzero((base > 0) & (rows <= 0)):
        raise ConfigError("feedback", f"group {domain}", "has a share of the stream and no rows: give it none, or text")
    if not (base > 0).any():
        raise ConfigError("feedback", "no group", "has a share of the stream: give one a weight above 0")


def _add(sums: np.ndarray, group: np.ndarray, z: np.ndarray, weight: np.ndarray) -> None:
    for column, values in enumerate((weight, weight * z, weight * z * z, weight**2)):
        sums[:, column] += np.bincount(group, values, len(sums))


def _memberships(members: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(group, row, weight) of every document of every row; a row's weights sum to 1."""
    row, column = np.nonzero(documents >= 0)
    weight = 1.0 / (documents >= 0).sum(1)[row]
    group = members[documents[row, column]]
    known = group >= 0
    return group[known], row[known], weight[known]
