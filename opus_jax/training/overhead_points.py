"""Ways to score cheaply, and how well each ranks candidates: measured by `benchmarks/overhead_frontier.py`.

Preliminary: 36 steps of one run on rows of 2048 tokens, two layers of width 64.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One way to score.

    Attributes:
      part: the window is the first row_tokens / part tokens of a row.
      derivative, parameters, select_every: as in `selection`.
      refresh: `proxy.refresh`, in scorings.
      proxy_part: `proxy.window` is the first row_tokens / proxy_part tokens of a row.
      ema: `proxy.ema`.
      alone: rank agreement with exact scores of whole rows, mean over all steps; 0 at steps without scores.
      with_feedback: the same where the groups' estimates stand in at those steps.
    """

    part: int
    derivative: str
    parameters: str
    select_every: int
    refresh: int
    proxy_part: int
    ema: float
    alone: float
    with_feedback: float

    def agreement(self, *, feedback: bool) -> float:
        return self.with_feedback if feedback else self.alone


POINTS = (
    Point(16, "difference", "all", 20, 1, 1, 0.0, 0.05, 0.33),
    Point(12, "difference", "all", 20, 1, 1, 0.0, 0.051, 0.364),
    Point(16, "difference", "all", 10, 2, 1, 0.0, 0.082, 0.45),
    Point(12, "difference", "all", 10, 2, 1, 0.0, 0.084, 0.476),
    Point(16, "difference", "all", 5, 4, 1, 0.0, 0.149, 0.481),
    Point(16, "difference", "all", 4, 5, 1, 0.0, 0.178, 0.515),
    Point(12, "difference", "all", 5, 4, 1, 0.0, 0.157, 0.517),
    Point(12, "difference", "all", 4, 5, 1, 0.0, 0.189, 0.574),
    Point(16, "difference", "all", 2, 10, 1, 0.0, 0.361, 0.633),
    Point(12, "difference", "all", 2, 10, 1, 0.0, 0.378, 0.667),
    Point(12, "difference", "all", 2, 5, 1, 0.0, 0.39, 0.677),
    Point(16, "difference", "all", 1, 20, 1, 0.0, 0.695, 0.695),
    Point(16, "difference", "all", 1, 10, 1, 0.0, 0.748, 0.748),
    Point(12, "difference", "all", 1, 10, 1, 0.0, 0.775, 0.775),
    Point(16, "difference", "all", 1, 5, 1, 0.0, 0.785, 0.785),
    Point(12, "difference", "all", 1, 5, 1, 0.0, 0.809, 0.809),
    Point(8, "difference", "all", 1, 5, 1, 0.0, 0.839, 0.839),
    Point(4, "difference", "all", 1, 5, 1, 0.0, 0.873, 0.873),
    Point(4, "difference", "all", 1, 1, 1, 0.0, 0.907, 0.907),
    Point(2, "jvp", "all", 1, 1, 1, 0.0, 0.954, 0.954),
    Point(1, "difference", "all", 1, 1, 1, 0.0, 1.0, 1.0),
)
