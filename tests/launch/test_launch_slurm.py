"""launch/slurm.sbatch, run as Slurm would run it, with an srun and an scontrol that note their arguments."""

import signal
from pathlib import Path

import pytest
from fake_checkout import CONFIG, Checkout, wait_for

SBATCH = ("bash", "launch/slurm.sbatch")
JOB = {"SLURM_JOB_ID": "17", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    made.trainer("finish")
    made.program("scontrol", "exit 0")
    return made


def srun(checkout: Checkout, action: str) -> None:
    finish = f"finish() {{ mkdir -p {checkout.run}; echo '{{}}' > {checkout.run}/summary.json; }}\n"
    checkout.program("srun", finish + action)


def test_it_asks_for_what_a_run_needs():
    text = (Path(__file__).resolve().parents[2] / "launch/slurm.sbatch").read_text()
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append", "--gpus-per-node=8", "--ntasks-per-node=8"} <= {
        *asked
    }


def test_a_finished_run_leaves_the_queue(checkout: Checkout):
    srun(checkout, "finish")
    assert checkout.call(*SBATCH, CONFIG, checkout.run_dir, **JOB).returncode == 0
    command = ["srun", "--kill-on-bad-exit=1", "--label", ".venv/bin/opus-jax", "train", CONFIG, checkout.run_dir]
    assert checkout.calls() == [command]


@pytest.mark.parametrize("code", [0, 1, 137])
def test_what_is_not_finished_goes_back_into_the_queue(checkout: Checkout, code: int):
    srun(checkout, f"exit {code}")
    assert checkout.call(*SBATCH, CONFIG, checkout.run_dir, **JOB).returncode == 0
    assert checkout.calls("scontrol") == [["scontrol", "requeue", "17"]]


def test_a_mistake_of_the_users_does_not(checkout: Checkout):
    srun(checkout, "exit 2")
    assert checkout.call(*SBATCH, CONFIG, checkout.run_dir, **JOB).returncode == 2
    assert not checkout.calls("scontrol")


def test_restarts_have_a_limit(checkout: Checkout):
    srun(checkout, "exit 1")
    done = checkout.call(*SBATCH, CONFIG, checkout.run_dir, **JOB, SLURM_RESTART_COUNT="2", RESTARTS="2")
    assert done.returncode == 1
    assert not checkout.calls("scontrol")


def test_it_outlives_the_signal_of_a_preemption(checkout: Checkout):
    srun(checkout, 'touch "$STATE/up"; until [ -e "$STATE/go" ]; do sleep 0.05; done')
    job = checkout.start(*SBATCH, CONFIG, checkout.run_dir, **JOB)
    wait_for(checkout.state / "up")
    job.send_signal(signal.SIGTERM)
    (checkout.state / "go").touch()
    job.communicate(timeout=30)
    assert job.returncode == 0
    assert checkout.calls("scontrol") == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        ([], JOB, "sbatch"),
        (["configs/none.yaml"], JOB, "configs/none.yaml"),
        ([CONFIG], {}, "not in a job"),
        ([CONFIG], {**JOB, "SLURM_NTASKS_PER_NODE": "2"}, "2 processes for 8 GPUs"),
    ],
)
def test_mistakes(checkout: Checkout, arguments: list[str], variables: dict[str, str], named: str):
    done = checkout.call(*SBATCH, *arguments, **variables)
    assert done.returncode == 2
    assert named in done.stderr
    assert checkout.calls() == []


def test_a_dry_run_prints_the_command(checkout: Checkout):
    done = checkout.call(*SBATCH, "--dry-run", CONFIG)
    assert done.stdout.strip() == f"srun --kill-on-bad-exit=1 --label .venv/bin/opus-jax train {CONFIG}"
    assert checkout.calls() == []
