"""launch/worker.sh: one process on a machine that a launcher started, and what its exit code says."""

import signal
import subprocess
from pathlib import Path

import pytest
from fake_checkout import CONFIG, Checkout, wait_for

WORKER = "launch/worker.sh"
INDICES = ("OPUS_JAX_PROCESS", "SKYPILOT_NODE_RANK", "MEGASCALE_SLICE_ID", "TPU_WORKER_ID", "JOB_COMPLETION_INDEX")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_finished_run_is_0(checkout: Checkout):
    checkout.trainer("finish")
    assert checkout.call(WORKER, CONFIG, checkout.run_dir).returncode == 0
    assert checkout.calls() == [["opus-jax", "train", CONFIG, checkout.run_dir]]


def test_a_clean_exit_without_a_summary_is_75(checkout: Checkout):
    checkout.trainer("exit 0")
    assert checkout.call(WORKER, CONFIG, checkout.run_dir).returncode == 75


@pytest.mark.parametrize("index", INDICES)
def test_only_process_0_knows_whether_the_run_is_finished(checkout: Checkout, index: str):
    checkout.trainer("exit 0")
    assert checkout.call(WORKER, CONFIG, checkout.run_dir, **{index: "1"}).returncode == 0
    assert checkout.call(WORKER, CONFIG, checkout.run_dir, **{index: "0"}).returncode == 75


def test_a_launcher_may_check_by_itself(checkout: Checkout):
    checkout.trainer("exit 0")
    assert checkout.call(WORKER, CONFIG, checkout.run_dir, LAUNCHER_CHECKS="1").returncode == 0


@pytest.mark.parametrize("code", [1, 2, 130])
def test_other_codes_are_the_training_processs(checkout: Checkout, code: int):
    checkout.trainer(f"exit {code}")
    assert checkout.call(WORKER, CONFIG, checkout.run_dir).returncode == code


def test_sigterm_is_handed_on_and_the_save_waited_for(checkout: Checkout):
    checkout.trainer(
        'trap "sleep 0.3; touch $STATE/saved; exit 0" TERM; touch "$STATE/up"; while :; do sleep 0.05; done'
    )
    worker = checkout.start(WORKER, CONFIG, checkout.run_dir)
    wait_for(checkout.state / "up")
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=30)
    assert (checkout.state / "saved").exists()
    assert worker.returncode == 75


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="workers are Linux machines")
def test_what_an_earlier_attempt_left_is_ended_and_nothing_else(checkout: Checkout):
    checkout.trainer("finish")
    left = subprocess.Popen(["bash", "-c", 'exec -a "opus-jax train" sleep 60'])
    other = subprocess.Popen(["sleep", "60"])
    try:
        for process, ends in ((left, True), (other, False)):
            (checkout.state / "opus-jax-train.pid").write_text(str(process.pid))
            assert checkout.call(WORKER, CONFIG, checkout.run_dir).returncode == 0
            assert (process.poll() is not None) == ends
    finally:
        for process in (left, other):
            process.kill()
            process.wait()
