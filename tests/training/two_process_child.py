"""One of two processes that save together, find the newest checkpoint damaged, walk back together and save again.

python two_process_child.py DIRECTORY PORT PROCESS
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opus_jax.training.checkpoint import Checkpoints


def main(directory: str, port: str, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = Mesh(np.array(jax.devices()), ("a",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("a"))

    def state(step: int) -> dict[str, jax.Array]:
        return {"x": jax.make_array_from_callback((8,), sharding, lambda at: np.arange(8, dtype=np.float32)[at] * step)}

    with Checkpoints(directory, 2, False) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"drawn": np.arange(2)}, {"at": step})
        checkpoints.wait()
        multihost_utils.sync_global_devices("saved")
        if process == 0:
            files = [f for f in (Path(directory) / "3" / "state").rglob("*") if f.is_file()]
            max(files, key=lambda f: f.stat().st_size).unlink()
        multihost_utils.sync_global_devices("damaged")
        like = {"x": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}
        restored = checkpoints.restore(like)
        assert restored is not None
        assert restored[0] == restored[3]["at"] == 2
        assert multihost_utils.process_allgather(restored[1]["x"], tiled=True).tolist() == [2.0 * i for i in range(8)]
        checkpoints.save(3, state(30), {"drawn": np.arange(2)}, {"at": 3})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
