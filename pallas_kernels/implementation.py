"""Which implementation of a kernel runs: XLA's, the Pallas kernel, or the Pallas kernel under the TPU interpreter."""

from typing import Any

import jax

from opus_jax.errors import UserError

IMPLEMENTATIONS = ("xla", "pallas", "interpret")


def platform_in_use() -> str:
    """'tpu', 'gpu' or 'cpu': the devices of the mesh in use (`jax.set_mesh`), or JAX's default without a mesh.

    The mesh tells it also while compiling for a TPU slice that is not there, where the default device is a CPU.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def resolve(implementation: str | None) -> str:
    """The implementation to trace: as asked for, or by the platform in use ('pallas' on TPU, 'xla' elsewhere).

    'interpret' runs the kernel's program step by step on the CPU, for tests: it simulates the TPU's memories.

    Raises:
      UserError: the name is unknown, or 'pallas' is asked for where there is no TPU.
    """
    platform = platform_in_use()
    if implementation is None:
        return "pallas" if platform == "tpu" else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation = {implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}, or None")
    if implementation == "pallas" and platform != "tpu":
        raise UserError(
            f"implementation = 'pallas' on {platform}: the kernel is for TPUs; use 'xla', or None to let the mesh "
            "in use (jax.set_mesh) decide"
        )
    return implementation


def pallas_interpret(implementation: str) -> Any:
    """What `pallas_call` takes as `interpret`. Memory never written reads as NaN, and reads past an array fail."""
    if implementation != "interpret":
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
