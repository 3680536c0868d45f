"""What the candidate stream samples from, and the pure function from (plan, seed, slot) to a row.

The stream is a sequence of slots, one row each. A plan changes only at fixed steps. It holds domain weights, how far
each domain has been read, and, where documents have priorities, how often each row comes in one pass over its domain.
"""

import difflib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from opus_jax.config import Config
from opus_jax.data import lattice
from opus_jax.data.permutation import permute
from opus_jax.data.records import Manifest
from opus_jax.errors import ConfigError, UserError


@dataclass(frozen=True, eq=False)
class Plan:
    """The stream from `first_slot` on. Weights and priorities say what is wanted; the other fields, filled in by
    `fitted` and `advance`, say what a corpus has and how far it was read.

    Attributes:
      domain_weights: float64[G], shares of the slots; their sum does not matter.
      priorities: float32[documents] or None (all alike), by document id.
      first_slot: the first slot that the plan is for.
      drawn: int64[G], rows drawn from every domain before `first_slot`.
      domain_rows: int64[G], rows that each domain has; those of domain g follow those of domain g - 1.
      epoch_origin: int64[G], the value of `drawn` at which the present order of a domain began. An order begins
        anew where `row_repeats` change for that domain, since its passes then have another length.
      row_repeats: int32[rows] or None (once each), how often a row comes in one pass over its domain.
    """

    domain_weights: np.ndarray
    priorities: np.ndarray | None = None
    first_slot: int = 0
    drawn: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    domain_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    epoch_origin: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    row_repeats: np.ndarray | None = None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a checkpoint; `from_arrays` gives the plan back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: np.asarray(value) for name, value in fields.items() if value is not None}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> "Plan":
        plain: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
        return Plan(**{"priorities": None, **plain, "first_slot": int(plain["first_slot"])})

    @cached_property
    def bounds(self) -> np.ndarray:
        return lattice.boundaries(self.domain_weights)

    @cached_property
    def domain_entries(self) -> list[np.ndarray]:
        """For each domain, the rows of one pass over it, every row as often as it comes."""
        rows = np.arange(self.domain_rows.sum())
        repeats = np.ones_like(rows) if self.row_repeats is None else self.row_repeats
        ends = np.cumsum(self.domain_rows)[:-1]
        return [np.repeat(r, k) for r, k in zip(np.split(rows, ends), np.split(repeats, ends), strict=True)]


def initial_plan(manifest: Manifest, config: Config) -> Plan:
    """The first plan: `corpus.weights` (domains it leaves out get nothing), or each domain by its rows.

    Raises:
      ConfigError: `corpus.weights` names an unknown domain.
      UserError: a domain with a weight above 0 has no rows for training.
    """
    rows = np.array([manifest.rows["train"][d] for d in manifest.domains], np.int64)
    given = config.corpus.weights
    for name in given:
        if name not in manifest.domains:
            close = difflib.get_close_matches(name, manifest.domains, n=1, cutoff=0.0)[0]
            raise ConfigError(f"corpus.weights.{name}", given[name], f"no such domain; the nearest is {close}")
    weights = np.array([given.get(d, 0.0) for d in manifest.domains]) if given else rows.astype(np.float64)
    for name, weight, count in zip(manifest.domains, weights, rows, strict=True):
        if weight > 0 and not count:
            raise UserError(
                f"domain {name!r} has weight {weight:g} and no rows for training: "
                f"set corpus.weights.{name}=0, add text, or lower corpus.row_tokens"
            )
    if not rows.sum():
        raise UserError("the corpus has no rows for training: add text, or lower corpus.row_tokens")
    return fitted(Plan(weights.astype(np.float64)), rows)


def fitted(plan: Plan, domain_rows: Int[np.ndarray, " G"], row_documents: Int[np.ndarray, "R S"] | None = None) -> Plan:
    """A plan of weights and priorities alone, from slot 0 on, for a corpus with so many rows in every domain.

    Raises:
      UserError: weights or priorities do not fit the corpus.
    """
    domain_rows, nothing = np.asarray(domain_rows, np.int64), np.zeros(len(domain_rows), np.int64)
    weights = _checked_weights(plan.domain_weights, domain_rows)
    blank = Plan(weights, None, 0, nothing, domain_rows, nothing)
    if plan.priorities is None:
        return blank
    return advance(blank, 0, priorities=plan.priorities, row_documents=row_documents)


def advance(
    plan: Plan,
    slot: int,
    weights: Float[np.ndarray, " G"] | None = None,
    priorities: Float[np.ndarray, " documents"] | None = None,
    row_documents: Int[np.ndarray, "R S"] | None = None,
) -> Plan:
    """The plan from `slot` on; what each domain has had until then is carried over.

    A row's priority is the mean over its documents. Within a domain, priorities are scaled to mean 1 and rounded
    systematically, so that a pass has as many draws as the domain has rows, equal priorities give every row exactly
    once, and priority 0 means never. A domain whose repeats change starts a fresh pass at `slot`; others go on.

    Args:
      weights: new domain weights; None keeps the present ones.
      priorities: by document id, at least 0; None keeps the present ones.
      row_documents: the documents of every row (`RowReader.row_documents`), needed with priorities.

    Raises:
      UserError: `slot` lies before the plan, or weights or priorities are unusable.
    """
    if slot < plan.first_slot:
        raise UserError(f"a plan for slot {slot} cannot follow one that begins at slot {plan.first_slot}")
    drawn = drawn_before(plan, slot)
    following = replace(plan, first_slot=slot, drawn=drawn)
    if weights is not None:
        following = replace(following, domain_weights=_checked_weights(weights, plan.domain_rows))
    if priorities is None:
        return following
    values = np.asarray(priorities, np.float32)
    repeats = _row_repeats(values, row_documents, following)
    origin = np.where(_same_repeats(repeats, plan), plan.epoch_origin, drawn)
    return replace(following, priorities=values, row_repeats=repeats, epoch_origin=origin)


def drawn_before(plan: Plan, slot: int) -> Int[np.ndarray, " G"]:
    """int64[G]: rows drawn from every domain before `slot`."""
    passed = lattice.count_before(slot, plan.bounds) - lattice.count_before(plan.first_slot, plan.bounds)
    return plan.drawn + passed


def rows_at(plan: Plan, seed: int, slot: int, count: int) -> Int[np.ndarray, " N"]:
    """int64[N]: the row indices of the slots `slot` .. `slot + count - 1`. Pure, and needs no earlier slot.

    Raises:
      UserError: `slot` lies before the plan.
    """
    if slot < plan.first_slot:
        raise UserError(f"slot {slot} lies before the plan, which begins at slot {plan.first_slot}")
    domains = lattice.domain_of(np.arange(slot, slot + count, dtype=np.int64), plan.bounds)
    drawn = drawn_before(plan, slot)
    chosen = np.empty(count, np.int64)
    for domain in np.unique(domains):
        places = np.flatnonzero(domains == domain)
        chosen[places] = _domain_rows(plan, seed, int(domain), drawn[domain] + np.arange(len(places)))
    return chosen


def _domain_rows(plan: Plan, seed: int, domain: int, draws: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """The rows of a domain's draws, counted from the run's beginning: a new permutation for every pass."""
    entries, origin = plan.domain_entries[domain], int(plan.epoch_origin[domain])
    epochs, places = np.divmod(draws - origin, len(entries))
    chosen = np.empty_like(draws)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        chosen[inside] = entries[permute(places[inside], len(entries), seed, domain, origin, int(epoch))]
    return chosen


def _checked_weights(weights: np.ndarray, domain_rows: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.shape != domain_rows.shape or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise UserError(f"domain weights {weights.tolist()}: {len(domain_rows)} finite values of at least 0, not all 0")
    if ((weights > 0) & (domain_rows == 0)).any():
        raise UserError(
            f"domain weights {weights.tolist()}: domain {np.argmax((weights > 0) & (domain_rows == 0))} has no rows"
        )
    return weights


def _row_repeats(priorities: np.ndarray, row_documents: np.ndarray | None, plan: Plan) -> np.ndarray:
    if row_documents is None or len(row_documents) != plan.domain_rows.sum():
        raise UserError("priorities need the documents of every training row (RowReader.row_documents)")
    if priorities.ndim != 1 or not np.isfinite(priorities).all() or (priorities < 0).any():
        raise UserError("priorities: one finite value of at least 0 for every document")
    if len(row_documents) and row_documents.max() >= len(priorities):
        raise UserError(f"priorities: {len(priorities)} values, but document ids go up to {row_documents.max()}")
    present = row_documents >= 0
    totals = np.where(present, priorities.astype(np.float64)[row_documents], 0.0).sum(1)
    of_rows = np.split(totals / np.maximum(present.sum(1), 1), np.cumsum(plan.domain_rows)[:-1])
    for domain, (values, weight) in enumerate(zip(of_rows, plan.domain_weights, strict=True)):
        if weight > 0 and not values.any():
            raise UserError(
                f"priorities of domain {domain} are all 0 but its weight is {weight:g}: set the weight to 0"
            )
    return np.concatenate([_systematic(values, plan.first_slot) for values in of_rows]).astype(np.int32)


def _systematic(values: Float[np.ndarray, " rows"], slot: int) -> Int[np.ndarray, " rows"]:
    """Whole numbers near values / mean(values), with the same sum as there are values.

    The offset differs between plans, so that over plans every row gets its share. Rounding to 1e-9 keeps equal
    values at exactly 1 each.
    """
    if not values.any():
        return np.zeros(len(values), np.int64)
    offset = (slot * lattice.STRIDE % lattice.MODULUS >> 12) / (lattice.MODULUS >> 12)
    cumulative = np.round(np.cumsum(values) / values.sum() * len(values), 9)
    cumulative[-1] = len(values)
    return np.diff(np.floor(cumulative + offset), prepend=np.floor(offset)).astype(np.int64)


def _same_repeats(repeats: np.ndarray, plan: Plan) -> np.ndarray:
    """bool[G]: the domain's rows come as often as before."""
    before = np.ones_like(repeats) if plan.row_repeats is None else plan.row_repeats
    ends = np.cumsum(plan.domain_rows)[:-1]
    return np.array([bool(part.all()) for part in np.split(repeats == before, ends)])
