"""What a score says something about besides its own row: its domain, its cluster of texts, its document.

Rows are rarely seen twice, their neighbours are. Groups are nested: a level's groups each lie within one group of the
level before, so that a group of which little was seen can borrow from its parent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int, Num

from opus_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Groups:
    """Levels of groups, coarse to fine; the first is the domain. Groups of the last level are called units, U of them.

    Attributes:
      levels: names, of 'domain', 'cluster', 'document'.
      parents: for each level, int64[groups], the group of the level before in which a group lies; zeros for domains.
      members: for each level after the first, int64[documents], the group of each document, -1 for one without rows.
      unit_rows: float64[U], training rows of each unit; a row of two documents counts half for each.
      unit_domain: int64[U].
      document_rows: float64[documents], training rows of each document; empty where domains are the finest level.
      labels: for each cluster group, (cluster, words that tell it); empty without that level.
    """

    levels: tuple[str, ...]
    parents: tuple[np.ndarray, ...]
    members: tuple[np.ndarray, ...]
    unit_rows: np.ndarray
    unit_domain: np.ndarray
    document_rows: np.ndarray = field(default_factory=lambda: np.zeros(0))
    labels: tuple[tuple[int, str], ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of groups of each level."""
        return tuple(len(parents) for parents in self.parents)

    @property
    def unit_of_document(self) -> np.ndarray | None:
        """int64[documents], or None where domains are the finest level."""
        return self.members[-1] if self.members else None

    def unit_shares(
        self, domain_shares: Num[np.ndarray, " G"], priorities: Num[np.ndarray, " documents"] | None = None
    ) -> Num[np.ndarray, " U"]:
        """float64[U]: what a plan gives each unit: its domain's share, by rows and their priorities."""
        mass, units = self.unit_rows, self.unit_of_document
        if priorities is not None and units is not None:
            known = units >= 0
            mass = np.bincount(units[known], (priorities * self.document_rows)[known], len(self.unit_rows))
        of_domain = np.bincount(self.unit_domain, mass, len(domain_shares))
        density = np.divide(domain_shares, of_domain, out=np.zeros(len(of_domain)), where=of_domain > 0)
        return density[self.unit_domain] * mass


def domain_groups(domain_rows: Sequence[float] | Sequence[int] | Num[np.ndarray, " G"]) -> Groups:
    """Domains only.

    Raises:
      UserError: there is no domain.
    """
    rows = np.asarray(domain_rows, np.float64)
    if rows.ndim != 1 or not len(rows):
        raise UserError(f"groups: rows of at least one domain are needed, not {domain_rows!r}")
    return Groups(("domain",), (np.zeros(len(rows), np.int64),), (), rows, np.arange(len(rows)))


def nested_groups(
    levels: Sequence[str],
    domain_rows: Int[np.ndarray, " G"],
    row_documents: Int[np.ndarray, "R S"],
    documents: int,
    clusters: Int[np.ndarray, " documents"] | None = None,
    labels: Sequence[str] = (),
) -> Groups:
    """Groups over a packed corpus.

    Args:
      levels: some of 'domain', 'cluster', 'document', in this order; 'domain' is always the first level.
      domain_rows: training rows of every domain, which follow one another.
      row_documents: documents of every training row, -1 where there is none.
      documents: their number in all splits.
      clusters: cluster of every document, needed for that level. A cluster counts within each domain by itself.
      labels: words for each cluster.
    """
    if set(levels) <= {"domain"}:
        return domain_groups(domain_rows)
    domain, rows = _document_facts(domain_rows, row_documents, documents)
    parents, members = [np.zeros(len(domain_rows), np.int64)], []
    of_document = domain
    told: tuple[tuple[int, str], ...] = ()
    if "cluster" in levels:
        assert clusters is not None, "clusters are needed for their level"
        of_document, pairs = _cells(domain, clusters)
        parents.append(pairs[:, 0])
        members.append(of_document)
        told = tuple((int(c), labels[int(c)] if int(c) < len(labels) else "") for c in pairs[:, 1])
    if "document" in levels:
        parents.append(np.maximum(of_document, 0))
        members.append(np.where(rows > 0, np.arange(documents), -1))
        return Groups(_names(levels), tuple(parents), tuple(members), rows, np.maximum(domain, 0), rows, told)
    unit_rows = np.bincount(of_document[of_document >= 0], rows[of_document >= 0], len(parents[-1]))
    return Groups(_names(levels), tuple(parents), tuple(members), unit_rows, parents[-1], rows, told)


def _names(levels: Sequence[str]) -> tuple[str, ...]:
    return ("domain", *(name for name in levels if name != "domain"))


def _document_facts(
    domain_rows: np.ndarray, row_documents: np.ndarray, documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """(domain of every document, -1 without rows; its training rows)."""
    present = np.asarray(row_documents) >= 0
    row, column = np.nonzero(present)
    ids = np.asarray(row_documents)[row, column]
    domain = np.full(documents, -1, np.int64)
    domain[ids] = np.repeat(np.arange(len(domain_rows)), domain_rows)[row]
    return domain, np.bincount(ids, 1.0 / present.sum(1)[row], documents)


def _cells(domain: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of each document's (domain, cluster) pair, -1 without rows; the pairs [cells, 2])."""
    known = domain >= 0
    pairs, cell = np.unique(np.stack([domain[known], clusters[known]], 1), axis=0, return_inverse=True)
    of_document = np.full(len(domain), -1, np.int64)
    of_document[known] = cell.reshape(-1)
    return of_document, pairs
