"""One metric over the steps of a run."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True)
class Series:
    """One metric over steps; NaN where the run wrote a number that is not finite."""

    steps: Int64[np.ndarray, " n"]
    values: Float64[np.ndarray, " n"]

    @property
    def last(self) -> float | None:
        return float(self.values[-1]) if len(self.values) else None


EMPTY = Series(np.zeros(0, np.int64), np.zeros(0))
