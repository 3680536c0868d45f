import numpy as np

from opus_jax.reports.budgets import step_seconds
from opus_jax.reports.series import EMPTY, Series


def test_seconds_where_every_third_step_is_logged() -> None:
    # Evaluations, at steps 2 and 4, log totals without a speed.
    tokens = Series(np.array([2, 3, 4, 6]), np.array([200.0, 300.0, 400.0, 600.0]))
    speed = Series(np.array([3, 6]), np.array([100.0, 50.0]))
    found = step_seconds(tokens, speed)
    assert found.steps.tolist() == [0, 3, 6]
    assert found.values.tolist() == [0.0, 3.0, 9.0]


def test_a_step_without_tokens_takes_no_time_that_is_known() -> None:
    steps = np.array([1, 2, 3])
    found = step_seconds(Series(steps, np.array([10.0, 10.0, 20.0])), Series(steps, np.array([10.0, 0.0, 5.0])))
    assert found.values.tolist() == [0.0, 1.0, 1.0, 3.0]


def test_a_run_before_its_first_step() -> None:
    assert step_seconds(EMPTY, EMPTY) is EMPTY
