"""opus_jax: train a model on data chosen by what it does to the model.

import opus_jax as oj

v = oj.direction(optimizer, opt_state, params, grad_reference, grad_proxy)
utilities = oj.utilities(loss_fn, params, v, batch)  # loss_fn(params, batch) -> [N]
indices, diagnostics = oj.select(utilities, k, temperature=0.5, key=key)

scores that steer any Grain dataset (a domain for each element, utilities from wherever you have them):

state, plan = oj.feedback.start(domains), oj.fit(oj.Plan(np.ones(domains)), domain_ids)
stream = oj.candidates(map_dataset, plan, seed, domain_ids=domain_ids)
state, wanted = oj.feedback.update(state, utilities, domain_ids_of_the_batch)
plan = oj.advance(plan, slot, wanted.domain_weights, wanted.priorities)  # from this slot on

or the whole trainer:

summary = oj.train(oj.Config.load("configs/quickstart.yaml", ["run.steps=100"]))
run = oj.load_run("runs/quickstart")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from opus_jax.distributed.platform import choose_platform

if TYPE_CHECKING:
    from opus_jax.config import Config
    from opus_jax.data.map_candidates import candidates, fit
    from opus_jax.data.plan import Plan, advance
    from opus_jax.influence.directional import document_utilities, token_utilities, utilities
    from opus_jax.influence.per_example import per_example_gradients
    from opus_jax.influence.sketch import sketch
    from opus_jax.optim.preconditioner import direction
    from opus_jax.reports.run import load_run
    from opus_jax.selection import feedback
    from opus_jax.selection.opus import select
    from opus_jax.training.loop import train

choose_platform()  # as commands do: an installed libtpu makes JAX fill a page with warnings where there is no TPU

# Imported on first use, so that the command line can speak before JAX has started.
_HOME = {
    "direction": "opus_jax.optim.preconditioner",
    "utilities": "opus_jax.influence.directional",
    "token_utilities": "opus_jax.influence.directional",
    "document_utilities": "opus_jax.influence.directional",
    "per_example_gradients": "opus_jax.influence.per_example",
    "sketch": "opus_jax.influence.sketch.tree",
    "select": "opus_jax.selection.opus",
    "feedback": "opus_jax.selection.feedback",
    "Plan": "opus_jax.data.plan",
    "advance": "opus_jax.data.plan",
    "fit": "opus_jax.data.map_candidates",
    "candidates": "opus_jax.data.map_candidates",
    "Config": "opus_jax.config",
    "train": "opus_jax.training.loop",
    "load_run": "opus_jax.reports.run",
}

__all__ = [
    "Config",
    "Plan",
    "advance",
    "candidates",
    "direction",
    "document_utilities",
    "feedback",
    "fit",
    "load_run",
    "per_example_gradients",
    "select",
    "sketch",
    "token_utilities",
    "train",
    "utilities",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'opus_jax' has no attribute {name!r}")
    home = import_module(_HOME[name])
    return home if home.__name__.endswith(f".{name}") else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
