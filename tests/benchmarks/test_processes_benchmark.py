"""The arms of the benchmark of processes do the same training."""

from contextlib import ExitStack

import pytest

from benchmarks import processes


@pytest.mark.slow
def test_two_processes_and_eight_devices_compute_the_losses_of_one() -> None:
    with ExitStack() as open_arms:
        arms = [open_arms.enter_context(processes._arm(*shape)) for shape in processes.ARMS.values()]
        for kind in processes.KINDS:
            losses = [loss for steps in arms for loss in steps(kind, 3)]
            assert len(losses) == 4, "one of each child process"
            assert losses == pytest.approx([losses[0]] * 4, abs=1e-4)
