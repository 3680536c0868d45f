"""launch/gke_xpk.sh, launch/gke_jobset.sh and the manifest that the latter fills in."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from fake_checkout import CONFIG, Checkout

XPK, JOBSET = "launch/gke_xpk.sh", "launch/gke_jobset.sh"
SCHEMA = json.loads((Path(__file__).parent / "jobset.schema.json").read_text())
SLICE = {
    "NAME": "opus-1", "IMAGE": "place/opus-jax:1", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "2x2x4",
    "BUCKET": "my-runs",
}  # fmt: skip
CLUSTER = ("--cluster", "pods", "--image", "place/opus-jax:1")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    made.program("xpk", "exit 0")
    made.program("kubectl", 'cat > "$STATE/manifest"')
    return made


def test_xpk_is_given_the_workload(checkout: Checkout):
    extra = ("--slices", "2", "--zone", "us-east5-a", "--restarts", "7", "--grace", "60")
    done = checkout.call(XPK, "opus-1", CONFIG, "corpus.path=two words", *CLUSTER, "--type", "v5p-64", *extra)
    assert done.returncode == 0
    assert checkout.calls() == [[
        "xpk", "workload", "create", "--workload", "opus-1", "--cluster", "pods", "--tpu-type", "v5p-64",
        "--num-slices", "2", "--docker-image", "place/opus-jax:1",
        "--command", rf"exec launch/worker.sh {CONFIG} corpus.path=two\ words ", "--max-restarts", "7",
        "--restart-on-exit-codes", "1,75", "--termination-grace-period-seconds", "60", "--priority", "medium",
        "--zone", "us-east5-a",
    ]]  # fmt: skip


def test_xpk_counts_gpu_machines(checkout: Checkout):
    assert checkout.call(XPK, "opus-1", CONFIG, *CLUSTER, "--type", "h100-80gb-8", "--slices", "3").returncode == 0
    line = " ".join(checkout.calls("xpk")[0])
    assert "--device-type h100-80gb-8 --num-nodes 3" in line


def test_a_dry_run_of_xpk(checkout: Checkout):
    done = checkout.call(XPK, "opus-1", CONFIG, *CLUSTER, "--type", "v5p-64", "--dry-run")
    assert done.stdout.startswith("xpk workload create --workload opus-1")
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["opus-1", CONFIG, "--cluster", "pods", "--type", "v5p-64"], "--image"),
        (["opus-1", *CLUSTER, "--type", "v5p-64"], "CONFIG"),
        (["n" * 41, CONFIG, *CLUSTER, "--type", "v5p-64"], "40"),
        (["opus-1", "configs/none.yaml", *CLUSTER, "--type", "v5p-64"], "configs/none.yaml"),
    ],
)
def test_mistakes_with_xpk(checkout: Checkout, arguments: list[str], named: str):
    done = checkout.call(XPK, *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert checkout.calls() == []


def manifest(checkout: Checkout, *arguments: str, **variables: str) -> dict[str, Any]:
    done = checkout.call(JOBSET, *arguments, **{**SLICE, **variables})
    assert done.returncode == 0, done.stderr
    assert checkout.calls("kubectl")[-1] == ["kubectl", "apply", "-f", "-"]
    return yaml.safe_load((checkout.state / "manifest").read_text())


def test_the_manifest_is_a_jobset(checkout: Checkout):
    jsonschema.validate(manifest(checkout, CONFIG, SLICES="2", RESTARTS="9"), SCHEMA)


def test_the_schema_refuses_what_is_no_jobset(checkout: Checkout):
    good = manifest(checkout, CONFIG)
    for spoil in (
        lambda made: made["spec"].update(replicatedJob=[]),
        lambda made: made["spec"]["failurePolicy"].update(maxRestarts="many"),
        lambda made: made["spec"]["failurePolicy"]["rules"][0].update(action="Fail"),
        lambda made: made["spec"]["replicatedJobs"][0].pop("template"),
    ):
        bad = json.loads(json.dumps(good))
        spoil(bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, SCHEMA)


def test_the_manifest_says_what_was_asked_for(checkout: Checkout):
    override = 'corpus.noise={a: "b|c&d"}'
    made = manifest(checkout, CONFIG, override, SLICES="2", SERVICE_ACCOUNT="trainer")
    job = made["spec"]["replicatedJobs"][0]
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (2, 4)
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
    assert pod["serviceAccountName"] == "trainer"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-runs"
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    checkout.program("launch", "")
    shell = checkout.call(*container["command"][:2], container["command"][2].replace("exec launch/worker.sh", "launch"))
    assert shell.returncode == 0
    assert checkout.calls("launch") == [["launch", CONFIG, override]]


def test_exit_codes_that_end_the_workload(checkout: Checkout):
    made = manifest(checkout, CONFIG)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 130]
    assert made["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0


def test_a_dry_run_prints_the_manifest(checkout: Checkout):
    done = checkout.call(JOBSET, "--dry-run", CONFIG, **SLICE)
    assert yaml.safe_load(done.stdout)["kind"] == "JobSet"
    assert "$" not in done.stdout
    assert checkout.calls() == []


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        ([], {}, "CONFIG"),
        ([CONFIG], {"IMAGE": ""}, "IMAGE"),
        ([CONFIG], {"TOPOLOGY": "2x3"}, "TOPOLOGY"),
        ([CONFIG], {"TOPOLOGY": "sixteen"}, "TOPOLOGY"),
        ([CONFIG], {"NAME": "Opus"}, "NAME"),
    ],
)
def test_mistakes_with_the_manifest(checkout: Checkout, arguments: list[str], variables: dict[str, str], named: str):
    done = checkout.call(JOBSET, *arguments, **{**SLICE, **variables})
    assert done.returncode == 2
    assert named in done.stderr
    assert checkout.calls() == []
