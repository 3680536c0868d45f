"""A plan over anyone's Grain dataset: which element comes next, and nothing about what an element is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from opus_jax.data.plan import Plan, advance, fitted, rows_at
from opus_jax.errors import UserError

_UNBOUNDED = 1 << 48
_BLOCK = 256  # slots whose elements are worked out together
_LONGEST = 1 << 40  # a dataset of more elements is one that repeats itself


def candidates(
    map_dataset: grain.MapDataset,
    plan: Plan,
    seed: int,
    *,
    domain_ids: Int[np.ndarray, " elements"] | None = None,
    document_ids: Int[np.ndarray, "..."] | None = None,
) -> grain.MapDataset:
    """The elements of `map_dataset` in the order of the plan: an unbounded dataset, without a state.

    Element i is the one for slot `plan.first_slot + i`. Domains come in the proportions of `plan.domain_weights`, and
    within a domain every element comes once, in a new order, before any comes again; with `plan.priorities`, in
    proportion to the mean priority of its documents. What comes is a pure function of (seed, slot, plan): batch or
    prefetch it as any other dataset, and go on at any place with `[i:]`.

    Of a plan with nothing but weights, priorities and a first slot, passes over the domains begin at that slot, in an
    order of their own. To go on within the passes of the plan before, fit that one and advance it:

        plan = fit(plan, domain_ids)
        plan = advance(plan, slot, weights=new.domain_weights)

    Args:
      map_dataset: finite; elements of any structure, those of a domain need not lie together.
      domain_ids: the domain of every element. None: read from each element's "domain_id", once, unless the plan has
        only one domain.
      document_ids: the documents of every element, one or several (-1 = none), where the plan has priorities. None:
        each element is its own document.

    Raises:
      UserError: domains, documents and plan do not fit each other, or the dataset is empty or endless.
    """
    domains = _domain_ids(map_dataset, len(plan.domain_weights), domain_ids)
    order = np.argsort(domains, kind="stable")
    return grain.MapDataset.source(_Drawn(map_dataset, fit(plan, domains, document_ids), seed, order))


def fit(
    plan: Plan, domain_ids: Int[np.ndarray, " elements"], document_ids: Int[np.ndarray, "..."] | None = None
) -> Plan:
    """The plan with the number of elements of every domain in it; one that has them already is only checked.

    Raises:
      UserError: the plan was made for another number of elements, or gives weight to a domain without any.
    """
    counts = np.bincount(domain_ids, minlength=len(plan.domain_weights)).astype(np.int64)
    if len(plan.domain_rows):
        if not np.array_equal(plan.domain_rows, counts):
            raise UserError(
                f"the plan is for domains of {plan.domain_rows.tolist()} elements, the dataset has {counts.tolist()}"
            )
        return plan
    begun = np.full(len(counts), plan.first_slot)  # names the order of these passes; nothing was drawn in them
    blank = replace(
        fitted(Plan(plan.domain_weights), counts), first_slot=plan.first_slot, drawn=begun, epoch_origin=begun
    )
    if plan.priorities is None:
        return blank
    documents = element_documents(domain_ids, document_ids)
    return advance(blank, plan.first_slot, priorities=plan.priorities, row_documents=documents)


def element_documents(
    domain_ids: Int[np.ndarray, " elements"], document_ids: Int[np.ndarray, "..."] | None = None
) -> Int[np.ndarray, "elements S"]:
    """The documents of the elements in the order of a plan, domain by domain: `row_documents` for `advance`."""
    ids = np.arange(len(domain_ids)) if document_ids is None else np.asarray(document_ids)
    if len(ids) != len(domain_ids):
        raise UserError(f"document_ids: {len(ids)} of them for {len(domain_ids)} elements")
    return ids.reshape(len(ids), -1)[np.argsort(domain_ids, kind="stable")]


class _Drawn:
    """Grain's random-access source: place i holds the element of slot `first_slot + i`."""

    def __init__(self, map_dataset: grain.MapDataset, plan: Plan, seed: int, order: Int[np.ndarray, " elements"]):
        self._elements, self._plan, self._seed, self._order = map_dataset, plan, seed, order
        self._block: tuple[int, np.ndarray] = (-1, order[:0])

    def __len__(self) -> int:
        return _UNBOUNDED

    def __getitem__(self, index: int) -> Any:
        block, place = divmod(int(index), _BLOCK)
        known, elements = self._block  # read and replaced whole: threads may work a block out twice, never mix two
        if known != block:
            slot = self._plan.first_slot + block * _BLOCK
            elements = self._order[rows_at(self._plan, self._seed, slot, _BLOCK)]
            self._block = (block, elements)
        return self._elements[int(elements[place])]


def _domain_ids(
    map_dataset: grain.MapDataset, domains: int, given: Int[np.ndarray, " elements"] | None
) -> Int[np.ndarray, " elements"]:
    count = len(map_dataset)
    if not 0 < count < _LONGEST:
        raise UserError(f"the dataset has {count} elements: candidates are drawn from a finite one that is not empty")
    if given is None and domains == 1:
        return np.zeros(count, np.int64)
    ids = _read_domain_ids(map_dataset) if given is None else np.asarray(given)
    if ids.shape != (count,):
        raise UserError(f"domain_ids: shape {list(ids.shape)} for {count} elements")
    if ids.min() < 0 or ids.max() >= domains:
        raise UserError(f"domain_ids: {ids.min()} to {ids.max()}, but the plan has domains 0 to {domains - 1}")
    return ids.astype(np.int64)


def _read_domain_ids(map_dataset: grain.MapDataset) -> Int[np.ndarray, " elements"]:
    ids = np.empty(len(map_dataset), np.int64)
    for place in range(len(ids)):
        element = map_dataset[place]
        if not isinstance(element, Mapping) or "domain_id" not in element:
            raise UserError(f"element {place} of the dataset has no 'domain_id': give domain_ids")
        ids[place] = element["domain_id"]
    return ids
