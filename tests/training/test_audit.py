"""What an audit calls agreement is that of the scores in use, sketched or factored as they are."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from training.test_step import Run, config, rows

from opus_jax.influence import per_example
from opus_jax.influence.audit import rank_agreement
from opus_jax.models.loss import row_losses
from opus_jax.training.audit import approximates_products, make_audit
from opus_jax.training.feed import put_rows
from opus_jax.training.scoring import Chooser
from opus_jax.training.state import TrainState

FROZEN = (
    "selection.warm_start_steps=2",
    "selection.direction=adamw_frozen",
    "selection.audit_rows=16",
    "selection.redundancy=1.0",
)
SKETCHED = ("selection.sketch=count", "selection.sketched_utilities=true")
FACTORED = ("selection.engine=ghost", "selection.preconditioner=factored")


@pytest.fixture(scope="module")
def state() -> TrainState:
    """After two steps of a warm start, in which no engine has had a say."""
    run = Run(config(*FROZEN))
    run.go(2)
    return run.state


def batches(run: Run) -> Any:
    return tuple(put_rows(rows(n, s), run.mesh) for n, s in ((16, 2), (8, 102)))


def audited(state: TrainState, *overrides: str, devices: int = 1) -> dict[str, float]:
    run = Run(config(*FROZEN, *overrides), devices)
    there = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, run.state)
    found = make_audit(run.spec, run.optimizer, run.config, run.mesh)(there, *batches(run))
    return {name: float(x) for name, x in found.items()}


NARROW = (*FACTORED, *SKETCHED, "selection.sketch_width=16", "selection.audit_rows=6")


@pytest.fixture(scope="module")
def narrow(state: TrainState) -> dict[str, float]:
    return audited(state, *NARROW)


def test_utilities_are_audited_as_they_are_used(state: TrainState, narrow: dict[str, float]) -> None:
    """Out of narrow sketches, in a factored metric: the audit's figure is that of the step's own utilities."""
    run = Run(config(*FROZEN, *NARROW))
    candidates, proxy = batches(run)
    chooser = Chooser(run.spec, run.optimizer, run.config, state, candidates, proxy)
    _, v, _ = jax.jit(chooser.direction)(jax.random.key(0))
    exact = jax.jit(partial(per_example.utilities, partial(row_losses, run.spec)))(state.params, v, candidates)
    run.state = jax.tree.map(jnp.copy, state)  # the step's state is donated
    used = run.step(run.state, candidates, proxy)[1]["utility"]
    assert narrow["audit_rank_agreement"] == pytest.approx(float(rank_agreement(used[:6], exact[:6])), abs=0.01)
    assert narrow["audit_rank_agreement"] < 0.99, "otherwise this would show nothing"
    assert narrow["audit_products_agreement"] < 0.99


@pytest.mark.slow
def test_a_sketch_that_loses_nothing_agrees(state: TrainState) -> None:
    how = (*SKETCHED, "selection.engine=per_example", "selection.sketch_width=8192", "selection.score_chunk=8")
    found = audited(state, *how)
    assert set(found) == {"audit_rank_agreement", "audit_products_agreement"}
    assert min(found.values()) > 0.995


def test_a_factored_metric_of_exact_products_is_audited_too(state: TrainState) -> None:
    found = audited(state, *FACTORED)
    assert found["audit_rank_agreement"] > 0.99, "utilities are exact"
    assert 0.3 < found["audit_products_agreement"] < 0.999


@pytest.mark.parametrize("how", [("selection.engine=ghost",), ("selection.redundancy_rounds=4",)])
def test_exact_products_need_no_audit(how: Any) -> None:
    assert not approximates_products(config(*FROZEN, *how).selection)


@pytest.mark.slow
def test_fewer_rows_than_devices_are_audited_as_on_one(state: TrainState, narrow: dict[str, float]) -> None:
    many = audited(state, *NARROW, "mesh.data=4", "mesh.fsdp=2", devices=8)
    assert many == pytest.approx(narrow, abs=1e-3)
