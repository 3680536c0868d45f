"""How many rows of the candidate stream each step takes, and so which slots are its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Buffers:
    """N candidates at steps first, first + every, ... and K rows, which are all trained on, at every other step.

    Steps count from 0.

    Attributes:
      candidates: N, rows over all processes at a step that chooses.
      batch: K, rows over all processes at a step that does not.
      first: the first step that chooses.
      every: steps from one choice to the next.
    """

    candidates: int
    batch: int
    first: int = 0
    every: int = 1

    def chooses(self, step: int) -> bool:
        return step >= self.first and (step - self.first) % self.every == 0

    def rows(self, step: int) -> int:
        return self.candidates if self.chooses(step) else self.batch

    def slots_before(self, step: int) -> int:
        """Rows of all earlier steps together: the step's first slot."""
        choices = max(0, -((self.first - step) // self.every))  # of steps below `step`, rounded up
        return step * self.batch + choices * (self.candidates - self.batch)


def every_step(rows: int) -> Buffers:
    """The same number of rows at every step."""
    return Buffers(rows, rows)
