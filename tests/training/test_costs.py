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


def scored(parts: Parts, params: Any, v: Any, rows: Any, opt_state: Any = None) -> Any:
    """Utilities as the step computes them, and what it finds out about pairs."""
    state = TrainState(jnp.int32(5), params, opt_state, None, None, jax.random.key(0))
    chooser = Chooser(parts.spec, parts.optimizer, parts.config, state, rows, None)
    if parts.config.selection.unit == "document":
        return chooser.score_tokens(v, rows)
    found = chooser.ask(v, v, jax.random.key(1), rows)
    return found.utilities, found.gram


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


SKETCHED = "selection.sketched_utilities=true"
FROZEN = "selection.direction=adamw_frozen"
REDUNDANT = "selection.redundancy=1.0"


@pytest.mark.parametrize(
    "overrides",
    [
        "selection.engine=ghost",
        pytest.param(f"selection.engine=ghost selection.sketch=kron {SKETCHED}", marks=pytest.mark.slow),
        f"selection.engine=ghost selection.sketch=kron selection.sketch_width=2048 {SKETCHED} {FROZEN} {REDUNDANT}",
        pytest.param(
            f"selection.engine=ghost selection.sketch=count {FROZEN} {REDUNDANT} selection.preconditioner=factored",
            marks=pytest.mark.slow,
        ),
        f"selection.engine=ghost {REDUNDANT} selection.parameters=blocks",
        f"selection.engine=per_example selection.sketch=count {SKETCHED} {FROZEN} {REDUNDANT}",
        f"selection.engine=per_example selection.sketch=kron {SKETCHED} {FROZEN} model.tied=true model.norm=prenorm",
    ],
)
def test_ghost_and_sketches_cost_their_passes_sketches_and_products(overrides: str) -> None:
    """One pass, nothing in chunks: scoring and redundancy are compiled together, as the step has them."""
    parts = Parts(*overrides.split())
    state = jax.eval_shape(parts.optimizer.transform.init, parts.params)

    def score(params: Any, v: Any, rows: Any, state: Any) -> Any:
        return scored(parts, params, v, rows, state)

    counted = compiled(score, parts.params, parts.params, parts.rows(parts.config.candidates), state)
    assert counted == pytest.approx(parts.costs.scoring + parts.costs.redundancy, rel=0.06)


def test_muons_metric_costs_its_products_and_its_root() -> None:
    """By the formula: the compiler counts one of the root's steps."""
    settings = ("selection.engine=ghost", "selection.sketch=kron", "selection.direction=muon_frozen", REDUNDANT, MUON)
    parts = Parts(*settings, "selection.parameters=blocks")
    plain = Parts(*settings[:2], "selection.direction=identity", REDUNDANT, MUON, "selection.parameters=blocks")
    more = parts.costs.redundancy - plain.costs.redundancy
    sides = [(128, 128)] * 4 + [(128, 352)] * 2 + [(352, 128)]
    assert more == sum(2 * b * b * a + 2 * b**3 * (1 + 3 * 16) for a, b in sides)


def test_pairs_of_few_tokens_cost_products_of_tokens() -> None:
    """2 T^2 (D + F) for each pair of rows, where that is less than forming gradients."""
    settings = ("selection.engine=ghost", REDUNDANT, "selection.parameters=blocks", "selection.direction=identity")
    short = Parts(*settings, "selection.window=8")
    assert short.costs.redundancy == 8**2 * 2 * 8**2 * (4 * (128 + 128) + 3 * (128 + 352))


def test_a_tensor_sketch_costs_two_transforms_a_token() -> None:
    settings = ("selection.engine=ghost", "selection.sketch=tensor", "selection.preconditioner=factored", SKETCHED)
    narrow, wide = (
        Parts(*settings, f"selection.sketch_width={m}", FROZEN, "selection.parameters=blocks").costs.scoring
        for m in (1024, 2048)
    )
    more = 8 * 7 * (2 * TOKENS + 1) * (2.5 * 2048 * 11 - 2.5 * 1024 * 10)  # rows, matrices
    plain = narrow - 8 * 7 * (2 * TOKENS + 1) * 2.5 * 1024 * 10
    assert wide - narrow > more, "and the products with the proxy's sketch"
    assert plain > 0


def test_a_sketch_that_nothing_asks_for_is_not_made() -> None:
    idle, plain = Parts("selection.engine=per_example", "selection.sketch=count"), Parts("selection.engine=per_example")
    assert idle.costs == plain.costs
    found = jax.eval_shape(lambda p, v, rows: scored(idle, p, v, rows), idle.params, idle.params, idle.rows(8))
    assert found[1] is None


def test_what_scoring_has_done_is_spared_to_the_update() -> None:
    """(2 + rho) F for each candidate with sketched utilities, and only where a step chooses."""
    shared = Parts("selection.engine=ghost", "selection.shared=true")
    apart = Parts("selection.engine=ghost")
    buffers = buffers_of(shared.config)
    first = [shared.costs.training(step, buffers) for step in (0, 3)]
    assert first[0] == apart.costs.training(3, buffers) == apart.costs.update
    forward, attention = apart.costs.update // 12, 4 * TOKENS**2 * 128
    assert first[1] == 4 * (forward - attention), "of every chosen row the products of its matrices"


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
        lambda p, v, rows: scored(parts, p, v, rows)[0],
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
