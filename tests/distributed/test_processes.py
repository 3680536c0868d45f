"""Who belongs together, what is refused, and what is said while others are waited for."""

import os
import time
from typing import Any

import pytest
from several_processes import ends, free_port, start, start_one

from opus_jax.distributed import processes
from opus_jax.distributed.group import Group, recognise
from opus_jax.errors import UserError

SIGNS = ("OPUS_JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE")

SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[007-009]", "SLURM_NTASKS": "3", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
OURS = {"OPUS_JAX_COORDINATOR": "first:1234", "OPUS_JAX_PROCESSES": "4", "OPUS_JAX_PROCESS": "3"}
POD = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with these variables and no other sign of company."""
    for name in os.environ:
        if name.startswith(SIGNS):
            monkeypatch.delenv(name)

    def given(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return given


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", lambda key: ("", 404))


def facts(group: Group | None) -> tuple[str, int, int, str, int | None]:
    assert group is not None
    return group.recognised, group.processes, group.process, group.coordinator(1.0), group.local_device


def test_a_machine_without_signs_is_alone(machine: Any) -> None:
    assert recognise() is None
    machine(KUBERNETES_SERVICE_HOST="10.0.0.1")  # a notebook's pod, say
    assert recognise() is None


def test_our_own_variables(machine: Any) -> None:
    machine(**OURS)
    assert facts(recognise()) == ("OPUS_JAX_* variables", 4, 3, "first:1234", None)


def test_our_own_variables_go_before_the_launchers(machine: Any) -> None:
    machine(**SLURM, **OURS)
    assert facts(recognise())[:3] == ("OPUS_JAX_* variables", 4, 3)


def test_slurm(machine: Any) -> None:
    machine(**SLURM)
    assert facts(recognise()) == ("Slurm", 3, 2, f"node007:{65535 - 2**12 + 1}", None)


@pytest.mark.parametrize(
    ("more", "device"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, None),  # one process for all GPUs of a machine
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "2"}, None),  # bound by the launcher
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1),
    ],
)
def test_processes_of_one_machine_take_a_gpu_each(machine: Any, more: dict[str, str], device: int | None) -> None:
    machine(**(SLURM | {"SLURM_LOCALID": "1"} | more))
    assert facts(recognise())[4] == device


def test_open_mpi_and_a_coordinator_of_ones_own(machine: Any) -> None:
    machine(**OPEN_MPI)
    assert facts(recognise())[:3] == ("Open MPI", 4, 1)
    assert facts(recognise())[3].startswith("10.96.0.1:")
    machine(OPUS_JAX_COORDINATOR="other:99")
    assert facts(recognise())[3] == "other:99"


def test_open_mpi_5_needs_to_be_told_the_coordinator(machine: Any) -> None:
    machine(**{name: value for name, value in OPEN_MPI.items() if "orte" not in name})
    with pytest.raises(UserError, match="Open MPI started 4 processes, but does not say where the first one is"):
        recognise()
    machine(OPUS_JAX_COORDINATOR="first:99")
    assert facts(recognise()) == ("Open MPI", 4, 1, "first:99", None)


def test_a_tpu_slice_and_several(machine: Any, tpu: None) -> None:
    machine(**(POD | {"TPU_WORKER_HOSTNAMES": "localhost,b,c,d"}))
    assert facts(recognise()) == ("a TPU slice on GKE", 4, 2, "localhost:8482", None)
    machine(**SLICES, JAX_COORDINATOR_PORT="77")
    assert facts(recognise()) == ("a TPU slice on GKE", 8, 6, "localhost:77", None)


def test_a_tpu_of_one_machine_is_alone_and_asks_no_server(
    machine: Any, tpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("jax._src.clusters.cloud_tpu_cluster.get_metadata")
    machine(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    assert recognise() is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OPUS_JAX_PROCESS": "1"}, "OPUS_JAX_PROCESS set without OPUS_JAX_COORDINATOR and OPUS_JAX_PROCESSES"),
        ({"OPUS_JAX_COORDINATOR": "a:1"}, "OPUS_JAX_COORDINATOR set without OPUS_JAX_PROCESSES and OPUS_JAX_PROCESS"),
        (OURS | {"OPUS_JAX_PROCESS": "4"}, "OPUS_JAX_PROCESS=4: the 4 processes have the numbers 0 to 3"),
        (OURS | {"OPUS_JAX_PROCESSES": "four"}, "OPUS_JAX_PROCESSES='four': must be a whole number"),
        (OURS | {"OPUS_JAX_COORDINATOR": "first"}, "OPUS_JAX_COORDINATOR='first': must be host:port"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, "has 4 tasks, and srun did not start this process"),
        (POD, "TPU_WORKER_HOSTNAMES names 4 workers .* this process alone would train: start the command on every"),
        (POD | OURS | {"OPUS_JAX_PROCESSES": "2", "OPUS_JAX_PROCESS": "0"}, "but 2 processes would train"),
        (POD | SLICES | OURS, "so 8 processes belong together, but 4 processes would train"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES set without MEGASCALE_COORDINATOR_ADDRESS and"),
        (SLICES | {"MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID=2, but MEGASCALE_NUM_SLICES=2"),
        (
            {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "x", "OPUS_JAX_PROCESSES": "2"},
            "OPUS_JAX_PROCESSES set without",
        ),
    ],
)
def test_what_is_incomplete_or_a_part_only_is_refused(machine: Any, variables: dict[str, str], message: str) -> None:
    machine(**variables)
    with pytest.raises(UserError, match=message):
        recognise()


def test_one_process_can_be_asked_for(machine: Any) -> None:
    machine(SLURM_JOB_ID="1", SLURM_NTASKS="4", OPUS_JAX_PROCESSES="1")
    assert recognise() is None


@pytest.mark.parametrize("value", ["soon", "0", "inf", "-3"])
def test_the_time_to_wait_is_checked(machine: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    machine(**OURS, OPUS_JAX_JOIN_SECONDS=value)
    with pytest.raises(UserError, match=r"OPUS_JAX_JOIN_SECONDS=.*must be a number of seconds above 0"):
        processes.start_processes()


def test_it_says_every_half_minute_what_it_waits_for(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a clock of its own: nothing is started here."""
    assert processes.DEFAULT_JOIN_SECONDS >= 1800
    assert processes.BEAT_SECONDS == 30
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(processes, "_initialize", lambda group, coordinator, seconds: time.sleep(0.5))
    monkeypatch.setattr(processes, "_refuse_other_devices", lambda group: None)
    machine(**(OURS | {"OPUS_JAX_COORDINATOR": f"localhost:{free_port()}"}))
    processes.start_processes()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "opus-jax: process 3 of 4 (from 0), recognised by OPUS_JAX_* variables"
    assert "waiting up to 1800 s for all processes" in said[1]
    assert "still waiting for the other processes at localhost:" in said[2]
    assert "process 0 does not answer there" in said[2]
    assert said[-1].startswith("opus-jax: all 4 processes are here after")


# -------------------------------------------------------------------------------------------- real processes


JOIN = """
import jax
from opus_jax.distributed import agreement, processes
from opus_jax.errors import UserError
processes.start_processes()
me = jax.process_index()
said = [agreement.of_first(lambda: f"from {me}")]
agreement.require_same("their cores", "all")
for check in (lambda: agreement.require_same("their colours", str(me)), lambda: fail(me)):
    try:
        with agreement.same_fate():
            check()
    except UserError as error:
        said.append(str(error))
agreement.require_one_history("same", {"plan": jax.numpy.arange(3)})
try:
    agreement.require_one_history("same", {"plan": jax.numpy.arange(3) + me})
except RuntimeError as error:
    said.append(str(error)[:60])
print(jax.process_count(), said)
"""


@pytest.mark.slow
def test_two_processes_join_and_agree_or_fail_together() -> None:
    code = "def fail(me):\n    if me == 1: raise UserError('the disk is full')\n" + JOIN
    found = ends(start(2, "-c", code), limit=120)
    assert [status for status, _, _ in found] == [0, 0], found
    expected = ["from 0", "processes 1 of 2 differ from process 0 in their colours"]
    history = "processes [1] of 2 have other losses, batches or plans than "[:60]
    for process, (_, output, errors) in enumerate(found):
        fate = "the disk is full" if process == 1 else "process 1 of 2: the disk is full"
        assert output.splitlines()[-1] == f"2 {[*expected, fate, history]}"
        assert f"process {process} of 2 (from 0), recognised by OPUS_JAX_* variables" in errors
        assert "all 2 processes are here" in errors


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_never_joins_ends_the_others_with_one_error(process: int) -> None:
    code = "from opus_jax.distributed.processes import start_processes; start_processes()"
    alone = OURS | {"OPUS_JAX_COORDINATOR": f"localhost:{free_port()}", "OPUS_JAX_PROCESS": str(process)}
    ((status, _, errors),) = ends([start_one(process, "-c", code, OPUS_JAX_JOIN_SECONDS="2", **alone)], limit=120)
    assert status == 1, errors
    last = errors.strip().splitlines()[-1]
    assert "not all of the 4 processes came to localhost:" in last
    assert "in 2 s" in last
    assert "see that the command runs 4 times with different numbers" in last
    assert ("process 0 does not answer there" in last) == (process == 1)
    assert "Traceback" not in errors
