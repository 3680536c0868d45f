"""Documents for candidates, cheaper scores, and broken ones, in the real step."""

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import replace
from opus_jax.errors import ConfigError
from opus_jax.influence import per_example
from opus_jax.models.loss import batch_loss, token_losses
from opus_jax.training.batches import window, without
from opus_jax.training.feed import put_rows
from opus_jax.training.goodput import Goodput
from opus_jax.training.recorder import Done, Recorder
from opus_jax.training.scoring import Chooser
from opus_jax.training.totals import Totals
from tests.training.test_step import TOKENS, Run, config, host, largest_difference, rows

CHEAP = ("selection.direction=identity", "selection.warm_start_steps=0")  # to trace, and to work out by hand
DOCUMENTS = ("selection.unit=document",)
BROKEN = 63  # a token that only broken rows hold


@cache
def model(devices: int = 1) -> Run:
    """All choices below are made at this state; the broken token is out of the proxy rows."""
    return Run(config(*CHEAP), devices)


def chosen_by(settings: tuple[str, ...], candidates: dict[str, np.ndarray], devices: int = 1) -> tuple[Any, Any]:
    """(rows to train on, metrics) of one choice. Where candidates hold the broken token, its embedding is NaN."""
    run, settled, proxy = model(devices), config(*CHEAP, *settings), rows(8, 102)
    proxy["tokens"] %= BROKEN
    state = run.state
    if (candidates["tokens"][:, 2] == BROKEN).any():
        state = replace(state, params=_with_broken_token(state.params))

    @jax.jit
    def choose(*given: Any) -> Any:
        choice = Chooser(run.spec, run.optimizer, settled, *given).choose()
        return choice.rows, choice.report

    with jax.set_mesh(run.mesh):
        batch, metrics = choose(state, put_rows(candidates, run.mesh), put_rows(proxy, run.mesh))
    return host(batch), host(metrics)


def _with_broken_token(params: Any) -> Any:
    table = params["embedding"]["embedding"]
    return params | {"embedding": {"embedding": table.at[BROKEN].set(jnp.nan)}}


# ------------------------------------------------------------------------------------------------ documents


def documents_of(run: Run, params: Any, v: Any, batch: Any) -> np.ndarray:
    """[N, 2]: each document's gradient of its own nats, by explicit gradients, over its row's targets, along v."""

    def nats(params: Any, rows: Any) -> Any:
        per_token = token_losses(run.spec, params, {name: rows[name] for name in batch}) * rows["own"]
        return per_token.sum(1) / rows["loss_mask"].sum(1)

    score = jax.jit(lambda own: per_example.utilities(nats, params, v, batch | {"own": own}))
    found = [score((batch["segment_ids"] == segment).astype(jnp.float32)) for segment in (1, 2)]
    return np.stack(found, 1).astype(np.float64)


def test_kept_rows_are_trained_on_their_chosen_documents_alone() -> None:
    """Utilities, the choice, the masks and the update, recomputed with explicit gradients of every document."""
    run = Run(config(*CHEAP, *DOCUMENTS, "selection.temperature=0"))
    params = jax.tree.map(jnp.asarray, host(run.state.params))
    candidates, proxy = ({k: jnp.asarray(v) for k, v in rows(n, s).items()} for n, s in ((16, 2), (8, 102)))

    @jax.jit
    def gradient(params: Any, batch: Any) -> Any:
        sums, tokens = jax.grad(lambda p: batch_loss(run.spec, p, batch), has_aux=True)(params)
        return jax.tree.map(lambda g: g / tokens, sums)

    utilities = documents_of(run, params, gradient(params, proxy), candidates)
    fresh, metrics = run.step(run.state, put_rows(rows(16, 2), run.mesh), put_rows(rows(8, 102), run.mesh))
    np.testing.assert_allclose(metrics["utility"], utilities.sum(1), rtol=2e-3, atol=1e-4 * np.abs(utilities).max())

    best = np.zeros(32, bool)
    best[np.argsort(-utilities.ravel())[:16]] = True  # ratio 0.5 of 32 documents
    best = best.reshape(16, 2)
    worth = np.where(best.any(1), (utilities * best).sum(1), utilities.max(1) - 1e3)
    kept = np.sort(np.argsort(-worth)[:8])
    np.testing.assert_array_equal(metrics["indices"], kept)
    trained = {name: np.array(x)[kept] for name, x in candidates.items()}
    whole = trained["loss_mask"].sum()
    good = np.pad(best[kept], ((0, 0), (1, 0)))
    trained["loss_mask"] *= np.take_along_axis(good, trained["segment_ids"], axis=1)
    assert int(metrics["update_tokens"]) == int(trained["loss_mask"].sum()) < whole
    assert float(metrics["document_share"]) == pytest.approx(trained["loss_mask"].sum() / whole)
    expected = gradient(params, jax.tree.map(jnp.asarray, trained))
    assert largest_difference(host(fresh.reference_gradient), host(expected)) < 1e-5


@cache
def plainly_chosen() -> tuple[Any, dict[str, np.ndarray]]:
    return chosen_by(DOCUMENTS, rows(16, 2))


@pytest.mark.parametrize(
    ("cheaper", "off"),
    [("selection.derivative=difference", 0.05), ("selection.dtype=bfloat16", 0.05), ("selection.rank=8", 0.5)],
)
def test_cheaper_scores_are_near_the_exact_ones(cheaper: str, off: float) -> None:
    exact, near = plainly_chosen()[1], chosen_by((*DOCUMENTS, cheaper), rows(16, 2))[1]
    assert near["utility"].dtype == np.float32
    np.testing.assert_allclose(near["utility"], exact["utility"], atol=off * np.abs(exact["utility"]).max())
    assert np.corrcoef(near["utility"], exact["utility"])[0, 1] > 0.9
    assert (near["utility"] != exact["utility"]).any()
    assert near["document_share"] < 1


def test_documents_beyond_the_window_stay_with_their_row() -> None:
    """What was not scored is neither chosen nor left out: here every row has one scored document, and keeps it."""
    batch, metrics = chosen_by((*DOCUMENTS, "selection.window=9"), rows(16, 0))
    before = rows(16, 0)["loss_mask"][metrics["indices"]]
    np.testing.assert_array_equal(batch["loss_mask"], before)
    assert metrics["document_share"] == 1


def test_documents_lie_on_eight_devices_as_on_one() -> None:
    (one, few), (eight, spread) = plainly_chosen(), chosen_by(DOCUMENTS, rows(16, 2), devices=8)
    np.testing.assert_array_equal(few["indices"], spread["indices"])
    np.testing.assert_array_equal(one["loss_mask"], eight["loss_mask"])
    np.testing.assert_allclose(few["z"], spread["z"], atol=5e-3)


def test_what_is_left_out_has_no_targets() -> None:
    batch = {name: jnp.asarray(x) for name, x in rows(4, 0).items()}
    left_out = jnp.asarray([[True, False], [False, True], [False, False], [True, True]])
    mask, whole = np.asarray(without(batch, left_out)["loss_mask"]), np.asarray(batch["loss_mask"])
    segments = np.asarray(batch["segment_ids"])
    assert not mask[0][segments[0] == 1].any()
    np.testing.assert_array_equal(mask[0][segments[0] == 2], whole[0][segments[0] == 2])
    assert not mask[1][segments[1] == 2].any()
    np.testing.assert_array_equal(mask[2], whole[2])
    assert not mask[3].any()
    assert window(batch, TOKENS) is batch


# ----------------------------------------------------------------------------------------------- not finite


def broken(positions: list[int]) -> dict[str, np.ndarray]:
    """Candidates of which only these hold the broken token."""
    batch = rows(16, 3)
    batch["tokens"] %= BROKEN
    batch["tokens"][positions, 2] = BROKEN
    return batch


METHODS = {
    "opus": ("selection.temperature=0.5",),
    "documents": ("selection.unit=document",),
    "by the Gram matrix": ("selection.engine=per_example", "selection.redundancy=1.0"),
    "in rounds": ("selection.redundancy=1.0", "selection.redundancy_rounds=2"),
    "greats": ("selection.method=greats",),
    "paper": ("selection.method=paper",),
    "high_loss": ("selection.method=high_loss",),
    "mid_loss": ("selection.method=mid_loss",),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_broken_row_is_counted_and_not_trained_on(method: str) -> None:
    bad = [0, 1, 4, 9, 10, 11, 15]
    _, metrics = chosen_by(METHODS[method], broken(bad))
    assert int(metrics["nonfinite_utilities"]) == len(bad)
    assert (metrics["utility"][bad] == -np.inf).all()
    assert np.isfinite(np.delete(metrics["utility"], bad)).all()
    assert not metrics["selected"][bad].any()
    assert metrics["selected"].sum() == 8
    assert metrics["z"].std() > 0, "sound rows are told apart"


@pytest.mark.parametrize("method", ["opus", "greats"])
def test_broken_rows_fill_up_what_sound_ones_do_not(method: str) -> None:
    """K rows whatever happens, all the sound ones among them: the loss then says at once what is wrong."""
    sound = [2, 7, 12]
    bad = [i for i in range(16) if i not in sound]
    _, metrics = chosen_by(METHODS[method], broken(bad))
    assert metrics["selected"].sum() == 8
    assert metrics["selected"][sound].all()
    assert len(set(metrics["indices"].tolist())) == 8


def test_broken_utilities_are_counted_in_the_line_and_left_out_of_its_mean() -> None:
    """A line of metrics.jsonl is what its step's metrics say; a finite mean is what a chart needs."""
    metrics = {
        "utility": np.array([1.0, -np.inf, 3.0], np.float32), "nonfinite_utilities": np.int32(1), "temperature": 0.5,
        "document_share": np.float32(0.75), "selected": np.array([True, False, True]), "update_tokens": 9, "loss": 2.0,
        "selected_at_random": False, "nonfinite_direction": 0, "learning_rate": 0.1, "grad_norm": 1.0,
    }  # fmt: skip
    recorder = Recorder.__new__(Recorder)
    recorder.domains, recorder.totals, recorder.goodput = ["prose"], Totals.start(1), Goodput()
    done = Done(4, {"domain_id": np.zeros(3, int)}, {}, None, 0.0, True)
    line = recorder._line(done, metrics, 1.0, scored=True)
    assert (line["utility_mean"], line["utility_sd"]) == (2.0, 1.0)
    assert (line["nonfinite_utilities"], line["document_share"]) == (1, 0.75)
    nothing = recorder._line(done, metrics | {"utility": np.full(3, -np.inf)}, 1.0, scored=True)
    assert nothing["utility_mean"] is None


# ---------------------------------------------------------------------------------------- what does not fit

REFUSED = {
    "documents of losses": ("selection.unit=document selection.method=high_loss", "selection.method = 'high_loss'"),
    "documents by the oracle": ("selection.unit=document selection.engine=per_example", "needs directional"),
    "documents and redundancy": ("selection.unit=document selection.redundancy=1.0", "selection.redundancy = 1.0"),
    "documents at random": ("selection.unit=document selection.temperature=.inf", "selection.temperature = inf"),
    "rank of losses": ("selection.rank=4 selection.method=random", "belongs to selection.method = opus"),
    "rank by the oracle": ("selection.rank=4 selection.engine=per_example", "the same at any rank"),
    "rank by differences": ("selection.rank=4 selection.derivative=difference", "selection.derivative=jvp"),
    "no rank": ("selection.rank=0", "must be at least 1"),
    "another type": ("selection.dtype=float16", "must be one of float32, bfloat16, null"),
    "another unit": ("selection.unit=token", "must be one of row, document"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    overrides, said = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(said)):
        config(*overrides.split())
