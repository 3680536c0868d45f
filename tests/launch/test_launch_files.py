"""The files of launch/: shell scripts by shellcheck, the SkyPilot task, the images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from fake_checkout import CONFIG, Checkout

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
SCHEMA = json.loads((Path(__file__).parent / "skypilot.schema.json").read_text())


def shellcheck(*arguments: str, text: str | None = None) -> None:
    program = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scripts_pass_shellcheck():
    shellcheck(*map(str, SCRIPTS))


def test_the_scripts_of_the_skypilot_task_pass_shellcheck():
    for part in ("setup", "run"):
        shellcheck("--shell=bash", "-", text=TASK[part])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_can_be_run_and_has_help(script: Path):
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    if script.name not in ("venv.sh", "worker.sh"):
        done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "Example: " in done.stdout
        assert "dry-run" in done.stdout


def test_the_skypilot_task_has_the_form_of_one():
    jsonschema.validate(TASK, SCHEMA)
    assert TASK["resources"]["use_spot"]
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert {"H100:8", "tpu-v6e-8"} == {kind["accelerators"] for kind in TASK["resources"]["any_of"]}


@pytest.mark.parametrize(("gpu", "nodes"), [(True, 2), (True, 1), (False, 2)])
def test_the_skypilot_task_tells_gpu_machines_where_process_0_is(tmp_path: Path, gpu: bool, nodes: int):
    checkout = Checkout(tmp_path)
    checkout.program("ls", f"exit {0 if gpu else 2}")
    seen = "${OPUS_JAX_COORDINATOR-alone} ${OPUS_JAX_PROCESSES-} ${OPUS_JAX_PROCESS-}"
    (checkout.folder / "launch/worker.sh").write_text(f'#!/bin/bash\necho "$@ / {seen}"\n')
    variables = {
        "CONFIG": CONFIG, "RUN": "opus-1", "OVERRIDES": "run.steps=3 run.seed=1", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }  # fmt: skip
    done = checkout.call("bash", "-c", TASK["run"], **variables)
    told = "10.0.0.1:8476 2 1" if gpu and nodes > 1 else "alone"
    assert done.stdout.strip() == f"{CONFIG} run.dir=/runs/opus-1 run.steps=3 run.seed=1 / {told}", done.stderr


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_an_image_is_made_of_files_that_exist_and_are_sent(device: str):
    text = (LAUNCH / f"Dockerfile.{device}").read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {*copied} <= sent
    assert all((ROOT / name).exists() for name in copied)
    assert f'".[{device}]"' in text
    extras = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^{device} = \[", extras, re.MULTILINE)
    version = re.search(r"^FROM python:(\S+)-slim$", text, re.MULTILINE)
    assert version
    assert (ROOT / f"requirements/python{version[1]}.txt").is_file()


@pytest.mark.parametrize("page", ["local", "tpu_pod", "gke", "slurm", "skypilot", "docker"])
def test_every_way_to_launch_has_a_page_whose_files_exist(page: str):
    text = (ROOT / "docs/launch" / f"{page}.md").read_text()
    named = {*re.findall(r"launch/[\w.]+\w", text)} - {f"launch/{page}.md"}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert f"launch/{page}.md" in (ROOT / "docs/index.md").read_text()
