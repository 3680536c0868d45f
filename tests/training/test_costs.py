"""The analytic costs against the compiler's count of the same functions that the step is made of.

The compiler counts the body of a loop once, so: one layer, nothing in chunks. What it counts beyond matrix products
and attention (norms, softmax, the loss) is a few percent at this width.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from opus_jax.config import Config, from_mapping
from opus_jax.distributed.mesh import make_mesh
from opus_jax.influence import per_example
from opus_jax.models import transformer
from opus_jax.models.loss import row_losses
from opus_jax.models.presets import ModelSpec, resolve
from opus_jax.optim.preconditioner import direction_with_report
from opus_jax.training.batches import abstract_batch, window
from opus_jax.training.build import buffers_of, optimizer_for
from opus_jax.training.costs import StepCosts, step_costs
from opus_jax.training.scoring import Chooser
from opus_jax.training.state import TrainState, abstract_state
from opus_jax.training.step import make_step
from opus_jax.training.update import mean_gradient

TOKENS, VOCABULARY = 64, 512
MUON = "optimizer.name=muon"


def config(*overrides: str) -> Config:
    return from_mapping(
        {
            "model": {"preset": "tiny", "layers": 1, "width": 128, "hidden": 352, "heads": 4},
            "corpus": {"row_tokens": TOKENS},
            "batch": {"rows": 4},
            "proxy": {"rows": 4},
            "selection": {"warm_start_steps": 3, "audit_rows": 3},
        },
        overrides,
    )


class Parts:
    """A configured model on one device, by its shapes alone."""

    def __init__(self, *overrides: str):
        self.config = config(*overrides)
        self.mesh = make_mesh(self.config.mesh, jax.devices()[:1])
        self.spec: ModelSpec = resolve(self.config.model, VOCABULARY, TOKENS)
        self.optimizer = optimizer_for(self.spec, self.config)
        self.params = jax.eval_shape(lambda: transformer.init(self.spec, jax.random.key(0)))
        self.costs = step_costs(self.spec, self.config)

    def rows(self, count: int) -> Any:
        return abstract_batch(count, TOKENS, self.mesh)


def flops(lowered: Any) -> float:
    return lowered.compile().cost_analysis()["flops"]


def scored(parts: Parts, params: Any, v: Any, rows: Any) -> Any:
    """Utilities as the step computes them."""
    state = TrainState(jnp.int32(5), params, None, None, None, jax.random.key(0))
    chooser = Chooser(parts.spec, parts.optimizer, parts.config, state, rows, None)
    if parts.config.selection.unit == "document":
        return chooser.score_tokens(v, rows)
    return chooser.score(v, jax.random.key(1), rows)


def compiled(function: Any, *shapes: Any) -> float:
    return flops(jax.jit(function).lower(*shapes))


@pytest.mark.parametrize("override", ["model.activation=swiglu", "model.kv_heads=2"])
def test_a_plain_step_costs_three_forward_passes_of_its_rows(override: str) -> None:
    parts = Parts("selection.method=none", override)
    step = make_step(parts.spec, parts.optimizer, parts.config, parts.mesh)
    state = abstract_state(parts.spec, parts.optimizer, parts.mesh, directed=False)
    assert flops(step.lower(state, parts.rows(4), None)) == pytest.approx(parts.costs.update, rel=0.06)
    assert (parts.costs.proxy, parts.costs.direction, parts.costs.scoring, parts.costs.audit) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "override",
    [
        "selection.ratio=0.25",
        "selection.window=32",
        "selection.engine=per_example",
        "selection.derivative=difference",
        "selection.parameters=blocks",
        "selection.parameters=top_half",
        "selection.rank=4",
        "selection.unit=document",
    ],
)
def test_scoring_costs_three_forward_passes_of_the_windows(override: str) -> None:
    parts = Parts(override)

    def score(params: Any, v: Any, rows: Any) -> Any:
        return scored(parts, params, v, rows)

    counted = compiled(score, parts.params, parts.params, parts.rows(parts.config.candidates))
    assert counted == pytest.approx(parts.costs.scoring + parts.costs.direction, rel=0.05)
    assert (parts.costs.direction > 0) == (parts.config.selection.rank is not None), "AdamW's own counts as nothing"


def test_losses_cost_one_forward_pass_of_the_windows() -> None:
    parts = Parts("selection.method=high_loss", "selection.window=32")
    rows = parts.rows(parts.config.candidates)
    counted = compiled(lambda p, rows: row_losses(parts.spec, p, window(rows, 32)), parts.params, rows)
    assert counted == pytest.approx(parts.costs.scoring, rel=0.05)
    assert parts.costs.direction == parts.costs.proxy == 0


def test_a_proxy_gradient_costs_three_forward_passes_of_its_rows() -> None:
    parts = Parts("proxy.rows=8")
    counted = compiled(lambda p, rows: mean_gradient(parts.spec, p, rows, None)[0], parts.params, parts.rows(8))
    assert counted == pytest.approx(parts.costs.proxy, rel=0.05)


def compiled_direction(parts: Parts) -> float:
    state = jax.eval_shape(parts.optimizer.transform.init, parts.params)

    def direction(state: Any, params: Any, reference: Any, proxy: Any) -> Any:
        return direction_with_report(parts.optimizer, state, params, reference, proxy, parts.config.selection.direction)

    return compiled(direction, state, *3 * [parts.params])


@pytest.mark.parametrize("mode", ["vjp", "muon_frozen"])
def test_muons_direction_costs_its_matrix_products(mode: str) -> None:
    parts = Parts(MUON, f"selection.direction={mode}")
    assert compiled_direction(parts) == pytest.approx(parts.costs.direction, rel=0.04)


def test_adams_direction_is_elementwise_and_counts_as_nothing() -> None:
    parts = Parts()
    assert parts.costs.direction == 0
    elements = sum(x.size for x in jax.tree.leaves(parts.params))
    assert compiled_direction(parts) < 100 * elements


def test_an_audit_scores_windows_and_checks_them_on_whole_rows() -> None:
    parts = Parts("selection.window=32")
    loss, rows = partial(row_losses, parts.spec), parts.rows(3)
    engine = compiled(
        lambda p, v, rows: scored(parts, p, v, rows),
        parts.params,
        parts.params,
        rows,
    )
    oracle = compiled(lambda p, v, rows: per_example.utilities(loss, p, v, rows), parts.params, parts.params, rows)
    assert parts.costs.proxy + engine + oracle == pytest.approx(parts.costs.audit, rel=0.05)


# ----------------------------------------------------------------------------------- which step pays what


COSTS = StepCosts(update=1000, proxy=100, direction=10, scoring=1, redundancy=0, audit=0)


def charged(*overrides: str, steps: int = 8) -> list[int]:
    settings = config(*overrides)
    return [COSTS.selection(step, settings, buffers_of(settings)) for step in range(steps)]


def test_warm_steps_choose_nothing_and_the_others_pay_for_all() -> None:
    assert charged() == [0, 0, 0, 111, 111, 111, 111, 111]


def test_steps_between_scorings_pay_nothing() -> None:
    assert charged("selection.select_every=2", "proxy.refresh=2") == [0, 0, 0, 111, 0, 11, 0, 111]


def test_the_proxy_gradient_is_paid_for_when_it_is_refreshed() -> None:
    assert charged("proxy.refresh=2") == [0, 0, 0, 111, 11, 111, 11, 111]


def test_without_a_warm_start_the_first_direction_needs_a_random_batchs_gradient() -> None:
    assert charged("selection.warm_start_steps=0", "proxy.refresh=4") == [1111, 11, 11, 11, 111, 11, 11, 11]
    assert charged("selection.warm_start_steps=0", "selection.method=high_loss", steps=2) == [111, 111]
