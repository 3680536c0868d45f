"""Goes on from the newest checkpoint and saves after every update, until it is killed.

    python saving_child.py DIRECTORY

Prints `<step> <hash of the state>` before each save.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from checkpoint_states import DATA, abstract, make_mesh, make_small_state, state_hash

from opus_jax.training.checkpoint import Checkpoints


def main() -> None:
    mesh = make_mesh(1)
    state = make_small_state(mesh)
    update = jax.jit(
        lambda s: s | {"step": s["step"] + 1, "params": jax.tree.map(lambda p: p * 1.01 + 0.1, s["params"])},
        donate_argnums=0,
    )
    with Checkpoints(sys.argv[1], keep=2, best=True, say=lambda line: None) as checkpoints:
        restored = checkpoints.restore(abstract(state, mesh))
        state = restored[1] if restored else state
        print(int(state["step"]), state_hash(state), flush=True)
        while True:
            state = update(state)
            step, digest = int(state["step"]), state_hash(state)
            print(step, digest, flush=True)
            checkpoints.save(step, state, DATA, {"hash": digest}, 1.0 / step)


if __name__ == "__main__":
    main()
