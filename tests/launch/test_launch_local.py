"""launch/local.sh: one machine, one process or several, restarts."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml
from fake_checkout import CONFIG, Checkout, wait_for
from small_runs import lines, mapping, write_text

LOCAL = "launch/local.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_dry_run_prints_the_commands_and_runs_none(checkout: Checkout):
    done = checkout.call(LOCAL, "--dry-run", CONFIG, "run.steps=3", PROCESSES="2", DEVICE="gpu")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["make", "--silent", ".venv/.base-gpu", "DEVICE=gpu"]
    for index in (0, 1):
        variables = f"OPUS_JAX_COORDINATOR=127.0.0.1:PORT OPUS_JAX_PROCESSES=2 OPUS_JAX_PROCESS={index}"
        command = f"env {variables} CUDA_VISIBLE_DEVICES={index} .venv/bin/opus-jax train {CONFIG} run.steps=3"
        assert lines[1 + index].strip() == command
    assert checkout.calls() == []


def test_one_process_gets_no_variables_of_several(checkout: Checkout):
    checkout.trainer('echo "told: ${OPUS_JAX_PROCESSES-nothing}"; finish')
    done = checkout.call(LOCAL, CONFIG, checkout.run_dir)
    assert (done.returncode, done.stdout) == (0, "told: nothing\n")
    assert checkout.calls("opus-jax") == [["opus-jax", "train", CONFIG, checkout.run_dir]]
    assert checkout.calls("make") == [["make", "--silent", ".venv/.base-cpu", "DEVICE=cpu"]]


def test_several_processes_know_each_other_and_their_output_is_numbered(checkout: Checkout):
    checkout.trainer('echo "$OPUS_JAX_PROCESS of $OPUS_JAX_PROCESSES at $OPUS_JAX_COORDINATOR"; echo oh >&2; finish')
    done = checkout.call(LOCAL, CONFIG, checkout.run_dir, PROCESSES="3")
    assert done.returncode == 0
    heads = re.findall(r"^\[(\d)\] (\d) of 3 at (127\.0\.0\.1:6789)$", done.stdout, re.MULTILINE)
    assert sorted((mark, index) for mark, index, _ in heads) == [("0", "0"), ("1", "1"), ("2", "2")]
    assert len({address for _, _, address in heads}) == 1
    assert sorted(re.findall(r"^\[(\d)\] oh$", done.stdout, re.MULTILINE)) == ["0", "1", "2"]


def test_a_crash_is_followed_by_another_attempt(checkout: Checkout):
    checkout.trainer('[ "$call" -lt 3 ] && exit 1; finish')
    assert checkout.call(LOCAL, CONFIG, checkout.run_dir).returncode == 0
    assert len(checkout.calls("opus-jax")) == 3


def test_one_crash_too_many_ends_it(checkout: Checkout):
    checkout.trainer("exit 7")
    assert checkout.call(LOCAL, CONFIG, checkout.run_dir, RETRIES="1").returncode == 7
    assert len(checkout.calls("opus-jax")) == 2


@pytest.mark.parametrize("code", [2, 130])
def test_a_mistake_and_a_stop_by_hand_are_final(checkout: Checkout, code: int):
    checkout.trainer(f"exit {code}")
    assert checkout.call(LOCAL, CONFIG, checkout.run_dir).returncode == code
    assert len(checkout.calls("opus-jax")) == 1


def test_a_clean_exit_without_a_summary_is_a_preemption_and_does_not_count(checkout: Checkout):
    checkout.trainer('[ "$call" -lt 3 ] && exit 0; finish')
    done = checkout.call(LOCAL, CONFIG, checkout.run_dir, RETRIES="0")
    assert done.returncode == 0
    assert len(checkout.calls("opus-jax")) == 3
    assert "preempted" in done.stderr


def test_when_one_process_dies_the_others_are_ended(checkout: Checkout):
    stubborn = 'trap "" TERM; echo $$ > "$STATE/pid"; for i in $(seq 600); do sleep 0.1; done'
    dying = 'until [ -e "$STATE/pid" ]; do sleep 0.02; done; exit 9'
    checkout.trainer(f'if [ "$OPUS_JAX_PROCESS" = 0 ]; then {stubborn}; else {dying}; fi')
    begun = time.monotonic()
    done = checkout.call(LOCAL, CONFIG, checkout.run_dir, PROCESSES="2", RETRIES="0", GRACE="1")
    assert done.returncode == 9
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((checkout.state / "pid").read_text()), 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_process_and_nothing_is_started_again(
    checkout: Checkout, number: signal.Signals, code: int
):
    checkout.trainer('trap "touch $STATE/saved; exit 0" TERM; touch "$STATE/up"; while :; do sleep 0.05; done')
    launcher = checkout.start(LOCAL, CONFIG, checkout.run_dir)
    wait_for(checkout.state / "up")
    launcher.send_signal(number)
    launcher.communicate(timeout=30)
    assert launcher.returncode == code
    assert (checkout.state / "saved").exists()
    assert len(checkout.calls("opus-jax")) == 1


@pytest.mark.parametrize(("arguments", "variables"), [([], {}), ([CONFIG], {"PROCESSES": "none"})])
def test_wrong_arguments_are_the_users_mistake(checkout: Checkout, arguments: list[str], variables: dict[str, str]):
    done = checkout.call(LOCAL, *arguments, **variables)
    assert done.returncode == 2
    assert "PROCESSES" in done.stderr
    assert checkout.calls() == []


def test_help_is_help(checkout: Checkout):
    done = checkout.call(LOCAL, "--help")
    assert done.returncode == 0
    assert "Example: PROCESSES=2 launch/local.sh" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.slow
def test_two_real_processes_train_together_and_go_on_after_one_is_killed(checkout: Checkout, tmp_path: Path):
    checkout.install()
    write_text(tmp_path / "text")
    settings = mapping(tmp_path)
    settings["run"] |= {"steps": 60, "save_every": 2, "eval_every": 60}
    settings["selection"] = {"method": "random"}
    (checkout.folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    launcher = checkout.start(LOCAL, "tiny.yaml", PROCESSES="2", GRACE="5", XLA_FLAGS="")
    killer = threading.Thread(target=kill_one_when_saved, args=(launcher.pid, checkout.run / "checkpoints" / "4"))
    killer.start()
    try:
        out, err = launcher.communicate(timeout=300)
    finally:
        launcher.terminate()
    assert launcher.returncode == 0, out + err
    assert "crash 1" in err
    assert json.loads((checkout.run / "summary.json").read_text())["steps"] == 60
    assert [line["step"] for line in lines(checkout.run) if "loss" in line] == [*range(1, 61)]


def kill_one_when_saved(launcher: int, checkpoint: Path) -> None:
    """The second training process of this launcher, by its id."""
    wait_for(checkpoint, seconds=200)
    command = ["ps", "-o", "pid=,args=", "--ppid", str(launcher)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    trained = [line.split()[0] for line in listed if "opus_jax train" in line]
    os.kill(int(trained[1]), signal.SIGKILL)
