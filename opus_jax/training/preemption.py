"""When to stop, decided alike by every process: they must all save the same step, or a checkpoint is never whole.

A preemption notice is a SIGTERM to one process or to several. JAX's preemption service, where it is on, tells all
processes the step at which to save. Where it is off, and for Ctrl-C, the processes vote after every step; the votes of
a step are read one step later, when its results are at hand anyway, so that no process waits for a vote.
"""

import signal
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opus_jax.training.interrupt import StopRequest


def service_is_on() -> bool:
    """Whether JAX's preemption service catches SIGTERM for the processes of this run."""
    return jax.process_count() > 1 and bool(jax.config.jax_enable_preemption_service)  # type: ignore[attr-defined]


class Stopping:
    """Asked by every process after every step, from the same step on.

    Args:
      asked: what this process was asked for by a signal.
    """

    def __init__(self, asked: StopRequest):
        self._asked = asked
        self._processes, self._service = jax.process_count(), service_is_on()
        self._votes: jax.Array | None = None

    def after(self, step: int) -> signal.Signals | None:
        """Why every process has to save this step and leave: SIGTERM, SIGINT, or None = go on."""
        if self._processes == 1:
            return self._asked.signal
        if self._service and multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        decided = 0 if self._votes is None else int(self._votes)
        self._votes = self._cast(self._asked.signal or 0)
        return signal.Signals(decided) if decided else None

    def _cast(self, vote: int) -> jax.Array:
        """The highest vote of all, on its way."""
        sharding = NamedSharding(self._mesh, PartitionSpec("processes"))
        shape = (self._processes,)
        votes = jax.make_array_from_process_local_data(sharding, np.array([vote], np.int32), shape)
        return self._highest(votes)

    @cached_property
    def _mesh(self) -> Mesh:
        """One device of each process."""
        first = {device.process_index: device for device in reversed(jax.devices())}
        devices = np.array([first[process] for process in sorted(first)])
        return Mesh(devices, ("processes",), axis_types=(AxisType.Auto,))

    @cached_property
    def _highest(self) -> "jax.stages.Wrapped":
        return jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
