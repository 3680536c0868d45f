"""Which processes train together: what the user, the launcher or the machine says of them, before JAX is started.

JAX knows the signs of TPU slices, Slurm, Open MPI and Kubernetes jobs; here are added plain variables, and refusals
where the signs say that more processes belong together than would start.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opus_jax.errors import UserError

COORDINATOR, PROCESSES, PROCESS = "OPUS_JAX_COORDINATOR", "OPUS_JAX_PROCESSES", "OPUS_JAX_PROCESS"
ALONE = f"set {PROCESSES}=1 to train alone"

_NAMES = {  # JAX's classes; not all of them have a name of their own
    "OmpiCluster": "Open MPI",
    "SlurmCluster": "Slurm",
    "GkeTpuCluster": "a TPU slice on GKE",
    "GceTpuCluster": "a TPU slice on Compute Engine",
    "K8sCluster": "a Kubernetes job",
}
_SLICES = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")


@dataclass(frozen=True)
class Group:
    """Processes that train together, and the place of this one.

    Attributes:
      recognised: what said so, for a person.
      processes: how many there are.
      process: number of this one, from 0; process 0 is the coordinator.
      coordinator: takes seconds, gives host:port of process 0; may wait so long for its name to be known.
      local_device: the one GPU of this machine that is this process's; None = all.
    """

    recognised: str
    processes: int
    process: int
    coordinator: Callable[[float], str]
    local_device: int | None = None


def recognise() -> Group | None:
    """The group that this process belongs to, None = it trains alone.

    Raises:
      UserError: variables are incomplete or contradict each other, or there are signs of more processes than would
        start.
    """
    _refuse_stale_slices()
    group = _of_variables() or _of_cluster()
    _refuse_subset(1 if group is None else group.processes)
    return group if group is not None and group.processes > 1 else None


def slices() -> int:
    """TPU slices that train together."""
    return _count("MEGASCALE_NUM_SLICES") or 1


def _of_variables() -> Group | None:
    """OPUS_JAX_PROCESSES=1 needs no more; OPUS_JAX_COORDINATOR alone moves the coordinator of a recognised cluster."""
    given = [name for name in (COORDINATOR, PROCESSES, PROCESS) if os.environ.get(name)]
    if os.environ.get(PROCESSES) == "1":
        return Group(PROCESSES, 1, 0, lambda seconds: "")
    if not given or given == [COORDINATOR]:
        return None
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if name not in given]
    if missing:
        raise UserError(f"{' and '.join(given)} set without {' and '.join(missing)}: set all three in every process")
    processes, process = _count(PROCESSES), _count(PROCESS)
    if process >= processes:
        raise UserError(f"{PROCESS}={process}: the {processes} processes have the numbers 0 to {processes - 1}")
    address = _given_address()
    return Group("OPUS_JAX_* variables", processes, process, lambda seconds: address)


def _of_cluster() -> Group | None:
    """What JAX recognises, or the launcher says."""
    cluster = _jax_cluster()
    if cluster is not None:
        return _of_jax(cluster)
    if _count("OMPI_COMM_WORLD_SIZE") > 1:
        return _of_newer_open_mpi()
    _refuse_unrecognised()
    return None


def _jax_cluster() -> Any | None:
    from jax._src.clusters import ClusterEnv  # JAX offers no public list of what it recognises

    # the one that asks a server comes after those whose variables say it all
    for cluster in sorted(ClusterEnv._cluster_types, key=lambda cluster: cluster.__name__ == "GceTpuCluster"):
        with _asking(cluster):
            if _worth_asking(cluster) and cluster.is_env_present():
                return cluster
    return None


def _worth_asking(cluster: Any) -> bool:
    """A pod of no indexed job (a notebook's, say) is alone, and a TPU of one machine, which may have no server."""
    if cluster.__name__ == "K8sCluster":
        return "JOB_COMPLETION_INDEX" in os.environ
    if cluster.__name__ == "OmpiCluster":
        return "OMPI_MCA_orte_hnp_uri" in os.environ  # of later ones JAX asks mpi4py, if at all: see below
    if "Tpu" in cluster.__name__ and len(_tpu_workers()) == 1 and slices() == 1:
        return False
    return not cluster.opt_in_only_method


def _of_jax(cluster: Any) -> Group:
    with _asking(cluster):
        processes, process, local = (
            cluster.get_process_count(), cluster.get_process_id(), cluster.get_local_process_id()
        )  # fmt: skip
    given = _given_address() if os.environ.get(COORDINATOR) else None

    def coordinator(seconds: float) -> str:
        port = os.environ.get("JAX_COORDINATOR_PORT")
        return given or cluster.get_coordinator_address(timeout_secs=int(seconds), override_coordinator_port=port)

    return Group(_name(cluster), processes, process, coordinator, local if _shares() else None)


def _name(cluster: Any) -> str:
    return _NAMES.get(cluster.__name__, cluster.__name__)


@contextmanager
def _asking(cluster: Any) -> Iterator[None]:
    """Some ask a server over the network, with an error class each."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        more = ", TPU_SKIP_MDS_QUERY=1 where there is no metadata server" if "Gce" in cluster.__name__ else ""
        raise UserError(
            f"asking {_name(cluster)} who belongs together failed ({type(error).__name__}: {reason}): "
            f"set {COORDINATOR}, {PROCESSES} and {PROCESS}{more}, or {PROCESSES}=1 to train alone"
        ) from error


def _of_newer_open_mpi() -> Group:
    """Open MPI from 5 on says how many processes there are, but no longer where the first one is."""
    processes = _count("OMPI_COMM_WORLD_SIZE")
    if not os.environ.get(COORDINATOR):
        raise UserError(
            f"Open MPI started {processes} processes, but does not say where the first one is: give all of them "
            f"{COORDINATOR}=host:port (mpirun -x {COORDINATOR}=...), or {ALONE}"
        )
    address, local = _given_address(), _count("OMPI_COMM_WORLD_LOCAL_RANK") if _shares() else None
    return Group("Open MPI", processes, _count("OMPI_COMM_WORLD_RANK"), lambda seconds: address, local)


def _shares() -> bool:
    """Whether several processes are on this machine, and see all its GPUs."""
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    several = here.split("(")[0].split(",")[0] != "1"  # Slurm writes 4(x2),3
    return several and (visible is None or "," in visible)


# ------------------------------------------------------------------------------------------------ refusals


def _refuse_unrecognised() -> None:
    """Signs of a launcher that started more than this process, but not in a way that can be followed."""
    if "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        raise UserError(
            f"this Slurm job has {os.environ['SLURM_NTASKS']} tasks, and srun did not start this process: write "
            f"srun before the command, or {ALONE}"
        )
    if "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
        raise UserError(
            "this pod belongs to an indexed Kubernetes job, and the package that asks who else does is missing: pip "
            f"install kubernetes, or set {COORDINATOR}, {PROCESSES} and {PROCESS}, or {ALONE}"
        )
    if os.environ.get(COORDINATOR):
        raise UserError(f"{COORDINATOR} set without {PROCESSES} and {PROCESS}: set all three in every process")


def _tpu_workers() -> list[str]:
    """Machines (or processes) of this TPU slice, as far as variables name them."""
    return [worker for worker in os.environ.get(_workers_variable(), "").split(",") if worker]


def _workers_variable() -> str:
    return "TPU_PROCESS_ADDRESSES" if os.environ.get("TPU_PROCESS_ADDRESSES") else "TPU_WORKER_HOSTNAMES"


def _refuse_subset(processes: int) -> None:
    name, workers = _workers_variable(), _tpu_workers()
    expected = len(workers) * slices()
    if processes < expected:
        here = "this process alone" if processes == 1 else f"{processes} processes"
        raise UserError(
            f"{name} names {len(workers)} workers in each of {slices()} slice(s), so {expected} processes belong "
            f"together, but {here} would train: start the command on every worker, or unset {name} if it is left over"
        )


def _refuse_stale_slices() -> None:
    given = [name for name in _SLICES if os.environ.get(name)]
    if not given:
        return
    missing = [name for name in _SLICES if name not in given]
    if missing:
        raise UserError(
            f"{' and '.join(given)} set without {' and '.join(missing)}: unset what an earlier run over several "
            "slices has left, or set all three"
        )
    if _count("MEGASCALE_SLICE_ID") >= slices():
        raise UserError(
            f"MEGASCALE_SLICE_ID={os.environ['MEGASCALE_SLICE_ID']}, but MEGASCALE_NUM_SLICES={slices()}: unset what "
            "an earlier run over several slices has left"
        )


def _count(name: str) -> int:
    """A variable that is a whole number; 0 where it is not set."""
    value = os.environ.get(name) or "0"
    if not value.isdecimal():
        raise UserError(f"{name}={value!r}: must be a whole number of at least 0")
    return int(value)


def _given_address() -> str:
    address = os.environ[COORDINATOR]
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise UserError(f"{COORDINATOR}={address!r}: must be host:port, of the machine of process 0")
    return address
