"""opus_jax: train a model on data chosen by what it does to the model.

import opus_jax as oj

v = oj.direction(optimizer, opt_state, params, grad_reference, grad_proxy)
utilities = oj.utilities(loss_fn, params, v, batch)  # loss_fn(params, batch) -> [N]
indices, diagnostics = oj.select(utilities, k, temperature=0.5, key=key)

or the whole trainer:

summary = oj.train(oj.Config.load("configs/quickstart.yaml", ["run.steps=100"]))
run = oj.load_run("runs/quickstart")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opus_jax.config import Config
    from opus_jax.influence.directional import document_utilities, token_utilities, utilities
    from opus_jax.influence.per_example import per_example_gradients
    from opus_jax.optim.preconditioner import direction
    from opus_jax.reports.run import load_run
    from opus_jax.selection.opus import select
    from opus_jax.training.loop import train

# Imported on first use, so that the command line can speak before JAX has started.
_HOME = {
    "direction": "opus_jax.optim.preconditioner",
    "utilities": "opus_jax.influence.directional",
    "token_utilities": "opus_jax.influence.directional",
    "document_utilities": "opus_jax.influence.directional",
    "per_example_gradients": "opus_jax.influence.per_example",
    "select": "opus_jax.selection.opus",
    "Config": "opus_jax.config",
    "train": "opus_jax.training.loop",
    "load_run": "opus_jax.reports.run",
}

__all__ = [
    "Config",
    "direction",
    "document_utilities",
    "load_run",
    "per_example_gradients",
    "select",
    "token_utilities",
    "train",
    "utilities",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'opus_jax' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
