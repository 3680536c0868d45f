"""Engines that answer for pairs of candidates, and the update that scoring leaves behind, in the one step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.test_step import Run, config, flat, host, largest_difference, rows

from opus_jax.errors import ConfigError, UserError
from opus_jax.influence import per_example
from opus_jax.models.loss import batch_loss, row_losses
from opus_jax.optim.frozen import frozen_product

GREEDY = ("selection.temperature=0", "selection.redundancy=1.0", "selection.direction=adamw_frozen")
WIDE = ("selection.sketch=count", "selection.sketch_width=8192")  # wider than any matrix here: nothing is lost


def scored(*overrides: str, devices: int = 1) -> dict[str, np.ndarray]:
    """Metrics of the third step, at parameters that no engine has had a say in but through warm start steps."""
    return Run(config("selection.warm_start_steps=2", *overrides), devices).go(3)[2]


def oracle() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(greedy picks, utilities less the self term, Gram matrix) of that step in float64, with explicit gradients."""
    run = Run(config("selection.warm_start_steps=2", *GREEDY))
    run.go(2)
    params, opt_state = jax.tree.map(jnp.asarray, host((run.state.params, run.state.opt_state)))
    batch, proxy = ({k: jnp.asarray(v) for k, v in rows(n, s).items()} for n, s in ((16, 2), (8, 102)))
    gradients = per_example.per_example_gradients(lambda p, b: row_losses(run.spec, p, b), params, batch)

    def mean_loss(params):
        nats, tokens = batch_loss(run.spec, params, proxy)
        return nats / tokens

    one = [jax.tree.map(lambda g, i=i: g[i], gradients) for i in range(16)]
    moved = np.stack([flat(frozen_product(run.optimizer, opt_state, params, g)) for g in one])
    gram = moved @ np.stack([flat(g) for g in one]).T / 8
    utility = moved @ flat(jax.grad(mean_loss)(params)) - np.diagonal(gram) / 2
    left, chosen = list(range(16)), []
    for _ in range(8):
        chosen.append(max(left, key=lambda i: utility[i] - gram[chosen, i].sum()))
        left.remove(chosen[-1])
    return np.sort(chosen), utility, gram


@pytest.fixture(scope="module")
def expected():
    return oracle()


@pytest.mark.parametrize(
    "how",
    [
        ("selection.engine=ghost",),
        pytest.param(("selection.engine=ghost", *WIDE), marks=pytest.mark.slow),
        ("selection.engine=per_example", *WIDE, "selection.sketched_utilities=true", "selection.score_chunk=4"),
    ],
    ids=["pairs", "taps and sketches", "every gradient, sketched"],
)
def test_greedy_picks_with_redundancy_are_the_oracles(how, expected):
    found = scored(*GREEDY, *how)
    np.testing.assert_array_equal(found["indices"], expected[0])
    assert set(expected[0]) != set(np.argsort(-expected[1])[:8]), "otherwise redundancy would show nothing"


def test_eight_devices_pick_as_one(expected):
    whole = ("selection.engine=per_example", *WIDE, "selection.sketched_utilities=true")
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    np.testing.assert_array_equal(scored(*GREEDY, *whole, *mesh, devices=8)["indices"], expected[0])


@pytest.mark.slow
def test_taps_split_over_a_mesh_pick_as_one(expected):
    found = scored(*GREEDY, "selection.engine=ghost", *WIDE, "mesh.fsdp=4", "mesh.tensor=2", devices=8)
    np.testing.assert_array_equal(found["indices"], expected[0])


@pytest.mark.slow
def test_narrow_sketches_lose_little():
    whole = scored("selection.engine=ghost", "selection.parameters=blocks", "selection.direction=adamw_frozen")
    sketch = ("selection.sketch=count", "selection.sketch_width=512", "selection.sketched_utilities=true")
    narrow = scored(
        "selection.engine=ghost", "selection.parameters=blocks", "selection.direction=adamw_frozen", *sketch
    )
    assert np.corrcoef(whole["utility"], narrow["utility"])[0, 1] > 0.9
    assert (whole["utility"] != narrow["utility"]).any()


def test_utilities_by_taps_are_the_exact_ones():
    np.testing.assert_allclose(scored("selection.engine=ghost")["utility"], scored()["utility"], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("model", ["model.norm=simplenorm", "model.preset=gpt2-small"])
def test_the_shared_pass_updates_as_an_ordinary_step_does(model):
    """Every parameter: matrices, a tied table, positions, gains and biases; and the same loss and rows."""
    settings = ("selection.engine=ghost", "selection.temperature=0", model, "model.layers=2")
    apart, shared = Run(config(*settings)), Run(config(*settings, "selection.shared=true"))
    histories = apart.go(3), shared.go(3)
    for a, b in list(zip(*histories, strict=True))[1:]:  # after the warm start
        np.testing.assert_array_equal(a["indices"], b["indices"])
        for name in ("loss", "row_loss", "grad_norm", "update_tokens"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
    reference = host(apart.state.reference_gradient)
    assert largest_difference(reference, host(shared.state.reference_gradient)) < 1e-4 * np.abs(flat(reference)).max()
    assert (
        largest_difference(host(apart.state.params), host(shared.state.params)) < 2e-3
    )  # Adam's first steps are signs


@pytest.mark.parametrize("method", ["paper", "greats"])
def test_rules_of_pairs_are_the_same_by_both_engines(method):
    found = {e: scored(f"selection.method={method}", f"selection.engine={e}") for e in ("ghost", "per_example")}
    scale = np.abs(found["per_example"]["utility"]).max()
    np.testing.assert_allclose(found["ghost"]["utility"], found["per_example"]["utility"], atol=1e-3 * scale)
    np.testing.assert_array_equal(found["ghost"]["indices"], found["per_example"]["indices"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["paper", "greats"])
def test_rules_of_pairs_work_through_sketches_of_every_gradient(method):
    found = scored(f"selection.method={method}", "selection.engine=per_example", *WIDE)
    exact = scored(f"selection.method={method}", "selection.engine=per_example")
    np.testing.assert_array_equal(found["indices"], exact["indices"])


def test_exact_products_leave_out_a_tied_table():
    run = Run(config("selection.engine=ghost", "selection.redundancy=1.0", "model.tied=true"))
    with pytest.raises(UserError, match=r"model\.tied.*selection\.parameters=blocks"):
        run.go(2)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["selection.sketch=kron"], "selection.sketch"),
        (["selection.engine=ghost", "selection.sketch=kron", "selection.sketch_width=1000"], "selection.sketch_width"),
        (["selection.engine=ghost", "selection.sketch=tensor"], "selection.preconditioner"),
        (["selection.engine=ghost", "selection.sketched_utilities=true"], "selection.sketched_utilities"),
        (["selection.engine=ghost", "selection.shared=true", "selection.window=8"], "selection.window"),
        (["selection.shared=true"], "selection.engine"),
        (["selection.engine=ghost", "selection.shared=true", "batch.microbatch=4"], "batch.microbatch"),
        (["selection.method=greats", "selection.score_chunk=4"], "selection.score_chunk"),
        (["selection.engine=ghost", "selection.redundancy=1.0", "selection.score_chunk=4"], "selection.score_chunk"),
        (
            ["selection.engine=ghost", "selection.sketch=kron", "selection.sketched_utilities=true",
             "selection.redundancy=1.0"],
            "selection.direction",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides, key):
    with pytest.raises(ConfigError, match=key):
        config(*overrides)
