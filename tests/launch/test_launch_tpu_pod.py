"""launch/tpu_pod.sh against a gcloud that keeps a queued resource of two workers in a file."""

import signal
import subprocess
from pathlib import Path

import pytest
from fake_checkout import CONFIG, Checkout, wait_for

POD = "launch/tpu_pod.sh"
RUN = "run.dir=/shared/run one"
QUICK = ("--zone", "us-east5-a", "--type", "v5p-16", "--poll", "0")

# `codes` holds the exit code of every training attempt, `finished` that of every question for the summary.
GCLOUD = r"""
line="$*"
next() { head -n 1 "$STATE/$1"; sed -i.bak 1d "$STATE/$1"; }
case $line in
  *"queued-resources create"*) echo ACTIVE > "$STATE/slice" ;;
  *"queued-resources describe"*)
    cat "$STATE/slice" 2> /dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
  *"queued-resources delete"*) rm "$STATE/slice" ;;
  *"tpu-vm describe"*) printf '%s\t2\n' "$(cat "$STATE/node" 2> /dev/null || echo READY)" ;;
  *worker-is-here*) cat "$STATE/answers" ;;
  *kill\ -TERM*) touch "$STATE/stop" ;;
  *launch/worker.sh*)
    for word in "$@"; do case $word in --output-directory=*) echo "step 1" > "${word#*=}/0.log" ;; esac; done
    code=$(next codes)
    case $code in
      preempted) echo SUSPENDED > "$STATE/slice"; exit 255 ;;
      long) touch "$STATE/up"; until [ -e "$STATE/stop" ]; do sleep 0.05; done ;;
      *) exit "$code" ;;
    esac ;;
  *launch/finished.py*) exit "$(next finished)" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    made.program("gcloud", GCLOUD)
    (made.state / "answers").write_text("worker-is-here\nworker-is-here\n")
    subprocess.run(["git", "init", "--quiet"], cwd=made.folder, check=True)
    return made


def script(checkout: Checkout, codes: str, finished: str = "0") -> None:
    """What the training attempts, and the questions for the summary, exit with."""
    (checkout.state / "codes").write_text(codes.replace(" ", "\n") + "\n")
    (checkout.state / "finished").write_text(finished.replace(" ", "\n") + "\n")


def verbs(checkout: Checkout) -> list[str]:
    """What was done to the slice, in order; looks at it apart."""
    names = {
        "queued-resources create": "create", "queued-resources delete": "delete", "worker-is-here": "count",
        "tpu-vm scp": "copy", "launch/venv.sh": "install", "launch/worker.sh": "train",
        "launch/finished.py": "finished", "kill -TERM": "stop",
    }  # fmt: skip
    lines = [" ".join(arguments) for arguments in checkout.calls("gcloud")]
    return [next((verb for mark, verb in names.items() if mark in line), "look") for line in lines]


def changes(checkout: Checkout) -> list[str]:
    return [verb for verb in verbs(checkout) if verb != "look"]


def test_a_run_from_nothing_to_its_end(checkout: Checkout):
    script(checkout, "0")
    done = checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--spot", "--delete", "--project", "p")
    assert done.returncode == 0, done.stderr
    assert changes(checkout) == ["create", "count", "copy", "install", "train", "finished", "delete"]
    calls = dict(zip(verbs(checkout), checkout.calls("gcloud"), strict=True))
    assert calls["create"][1:] == [
        "compute", "tpus", "queued-resources", "create", "opus-1", "--zone=us-east5-a", "--project=p",
        "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--node-id=opus-1", "--spot", "--quiet",
    ]  # fmt: skip
    assert calls["train"][4:7] == ["ssh", "opus-1", "--zone=us-east5-a"]
    assert "--worker=all" in calls["train"]
    assert "--worker=0" in calls["finished"]
    assert rf"launch/worker.sh {CONFIG} run.dir=/shared/run\ one" in " ".join(calls["train"])
    assert (checkout.folder / "runs/logs/opus-1/attempt-1/opus-1/0.log").read_text() == "step 1\n"


def test_a_slice_that_was_taken_away_is_asked_for_again(checkout: Checkout):
    script(checkout, "preempted 0")
    done = checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--retries", "0")
    assert done.returncode == 0, done.stderr
    again = ["count", "copy", "install", "train"]
    assert changes(checkout) == ["create", *again, "delete", "create", *again, "finished"]


def test_a_clean_save_before_the_end_is_gone_on_from_on_the_same_slice(checkout: Checkout):
    script(checkout, "0 0", finished="75 0")
    assert checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--retries", "0").returncode == 0
    assert changes(checkout)[-4:] == ["train", "finished", "train", "finished"]


def test_crashes_are_counted(checkout: Checkout):
    script(checkout, "1 1 1")
    done = checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--retries", "1")
    assert done.returncode == 1
    assert changes(checkout).count("train") == 2
    assert "runs/logs/opus-1/attempt-2" in done.stderr


def test_a_mistake_of_the_users_is_final_and_the_slice_deleted_all_the_same(checkout: Checkout):
    script(checkout, "2")
    assert checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--delete").returncode == 2
    assert changes(checkout)[-2:] == ["train", "delete"]


def test_some_of_the_workers_are_not_enough(checkout: Checkout):
    (checkout.state / "answers").write_text("worker-is-here\n")
    done = checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--retries", "0")
    assert done.returncode == 1
    assert "1 of 2 workers answer" in done.stderr
    assert "train" not in changes(checkout)


def test_all_slices_train_at_once(checkout: Checkout):
    script(checkout, "0 0")
    assert checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK, "--slices", "2").returncode == 0
    trained = [" ".join(line) for line in checkout.calls("gcloud") if "launch/worker.sh" in " ".join(line)]
    assert sorted(line.split()[5] for line in trained) == ["opus-1-0", "opus-1-1"]
    created = next(line for line in checkout.calls("gcloud") if "create" in line)
    assert {"--node-count=2", "--node-prefix=opus-1"} <= set(created)


def test_a_slice_that_failed_ends_it_where_it_was_asked_for_just_now(checkout: Checkout):
    checkout.program("gcloud", GCLOUD.replace('echo ACTIVE > "$STATE/slice"', 'echo FAILED > "$STATE/slice"'))
    done = checkout.call(POD, "opus-1", CONFIG, RUN, *QUICK)
    assert done.returncode == 1
    assert "cannot be had" in done.stderr


def test_ctrl_c_stops_the_run_over_there_and_waits_for_it(checkout: Checkout):
    script(checkout, "long")
    launcher = checkout.start(POD, "opus-1", CONFIG, RUN, *QUICK)
    wait_for(checkout.state / "up")
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert changes(checkout)[-2:] == ["train", "stop"]


def test_a_dry_run_prints_everything_and_calls_nothing(checkout: Checkout):
    done = checkout.call(
        POD, "opus-1", CONFIG, RUN, *QUICK, "--reserved", "--delete", "--setup", "mount it", "--dry-run"
    )
    assert done.returncode == 0
    marks = [
        "create",
        "describe",
        "worker-is-here",
        "scp",
        "launch/venv.sh",
        "mount",
        "launch/worker.sh",
        "finished.py",
    ]
    assert [mark for line in done.stdout.splitlines() for mark in marks if mark in line.replace("\\", "")] == [
        "create", "describe", "describe", "worker-is-here", "scp", "launch/venv.sh", "mount", "launch/worker.sh",
        "finished.py",
    ]  # fmt: skip
    assert "queued-resources delete" in done.stdout.splitlines()[-1]
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["opus-1", CONFIG, *QUICK], "run.dir"),
        (["opus-1", CONFIG, "run.dir=runs/here", *QUICK], "run.dir"),
        (["opus-1", "configs/none.yaml", RUN, *QUICK], "configs/none.yaml"),
        (["Opus_1", CONFIG, RUN, *QUICK], "Opus_1"),
        (["opus-1", CONFIG, RUN, "--zone", "z"], "--type"),
        (["opus-1", CONFIG, RUN, *QUICK, "--slices", "0"], "--slices"),
        (["opus-1", CONFIG, RUN, *QUICK, "--spots"], "--spots"),
        (["opus-1", CONFIG, RUN, *QUICK, "--logs"], "--logs"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_asked_for(checkout: Checkout, arguments: list[str], named: str):
    done = checkout.call(POD, *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert checkout.calls() == []
