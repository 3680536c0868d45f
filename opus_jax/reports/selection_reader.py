"""The selection log, summed up in one pass: it may hold billions of rows, so never more than a batch is in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from jaxtyping import Float64, Int64

from opus_jax.errors import UserError

Z_EDGES = np.linspace(-4, 4, 33)  # of the histogram of z-scores; what lies outside counts in the outer bins
_COLUMNS = ("step", "example_id", "domain_id", "utility", "z", "selected")
_BATCH_ROWS = 1 << 17
_STEPS_PER_PERIOD = 5  # at least, since the shares of single steps are mostly noise


@dataclass(frozen=True)
class Extreme:
    """One scored candidate: a row of the training split at a step."""

    step: int
    example_id: int
    domain_id: int
    utility: float
    z: float
    selected: bool


@dataclass(frozen=True)
class SelectionSummary:
    """Counts over P periods of equal numbers of steps, G domains and Z bins of the z-score.

    Attributes:
      edges: first step of every period, and the step after the last; Q = P + 1.
      offered: candidates. selected: those that were trained on.
      z_counts: scored candidates by z-score; all zero for a method that does not score.
      highest: the candidates of highest z, each example once, best first. lowest: likewise, worst first.
    """

    edges: Int64[np.ndarray, " Q"]
    offered: Int64[np.ndarray, "P G"]
    selected: Int64[np.ndarray, "P G"]
    z_counts: Int64[np.ndarray, "P G Z"]
    highest: tuple[Extreme, ...]
    lowest: tuple[Extreme, ...]

    @property
    def middles(self) -> Float64[np.ndarray, " P"]:
        """The step in the middle of every period."""
        return (self.edges[:-1] + self.edges[1:] - 1) / 2


class SelectionReader:
    """Reads `selection/*.parquet` of a run folder; a run that keeps no log has none."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def exists(self) -> bool:
        return any(self.folder.glob("*.parquet"))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The log in order, some rows at a time, as columns; z and utility are NaN where the log holds none.

        Raises:
          UserError: a part is damaged or lacks a column.
        """
        try:
            parts = ds.dataset(sorted(map(str, self.folder.glob("*.parquet"))), format="parquet")
            for batch in parts.to_batches(columns=list(_COLUMNS), batch_size=_BATCH_ROWS):
                if batch.num_rows:
                    yield {name: batch[name].to_numpy(zero_copy_only=False) for name in _COLUMNS}
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the selection log in {self.folder} is damaged ({reason}): restore or delete that part"
            ) from None

    def summarise(
        self,
        domains: int,
        last_step: int,
        *,
        first_scored: int | None,
        periods: int = 40,
        extremes: int = 8,
        training_rows: int | None = None,
    ) -> SelectionSummary:
        """Sum up the log.

        Args:
          domains: G.
          last_step: rows of later steps are left out.
          first_scored: rows from this step on have scores; None = the method does not score.
          periods: P at most.
          extremes: how many of the highest and of the lowest.
          training_rows: examples from this one on, which are proxy rows, are no extremes; None = there are none.
        """
        edges = np.unique(
            np.linspace(1, last_step + 1, min(periods, 1 + last_step // _STEPS_PER_PERIOD) + 1).astype(np.int64)
        )
        shape = (len(edges) - 1, domains)
        offered, selected = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        z_counts = np.zeros((*shape, len(Z_EDGES) - 1), np.int64)
        highest, lowest = _Best(extremes, sign=-1), _Best(extremes, sign=1)
        for rows in self.batches():
            rows = _where(rows, (rows["step"] >= 1) & (rows["step"] <= last_step) & (rows["domain_id"] < domains))
            place = (np.searchsorted(edges, rows["step"], "right") - 1, rows["domain_id"])
            np.add.at(offered, place, 1)
            np.add.at(selected, place, rows["selected"].astype(np.int64))
            if first_scored is None:
                continue
            scored = _where(rows, (rows["step"] >= first_scored) & np.isfinite(rows["z"]))
            np.add.at(z_counts, (_period(edges, scored), scored["domain_id"], _z_bin(scored["z"])), 1)
            named = scored if training_rows is None else _where(scored, scored["example_id"] < training_rows)
            highest.add(named)
            lowest.add(named)
        return SelectionSummary(edges, offered, selected, z_counts, highest.found(), lowest.found())


def _where(rows: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[keep] for name, column in rows.items()}


def _period(edges: np.ndarray, rows: dict[str, np.ndarray]) -> np.ndarray:
    return np.searchsorted(edges, rows["step"], "right") - 1


def _z_bin(z: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(Z_EDGES, z, "right") - 1, 0, len(Z_EDGES) - 2)


class _Best:
    """The examples whose best z is smallest (sign 1) or largest (sign -1), of all rows added so far."""

    def __init__(self, count: int, sign: int):
        self._count, self._sign = count, sign
        self._rows: dict[str, np.ndarray] | None = None

    def add(self, rows: dict[str, np.ndarray]) -> None:
        if self._rows is not None:
            rows = {name: np.concatenate([self._rows[name], rows[name]]) for name in _COLUMNS}
        order = np.lexsort((rows["step"], self._sign * rows["z"]))
        _, first = np.unique(rows["example_id"][order], return_index=True)
        self._rows = _where(rows, order[np.sort(first)[: self._count]])

    def found(self) -> tuple[Extreme, ...]:
        if self._rows is None:
            return ()
        columns = [self._rows[name].tolist() for name in _COLUMNS]
        return tuple(
            Extreme(step, example, domain, utility, z, selected)
            for step, example, domain, utility, z, selected in zip(*columns, strict=True)
        )
