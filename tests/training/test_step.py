"""The one step: its selections and updates against slow, obvious computations, over chunks and meshes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opus_jax.config import Config, from_mapping
from opus_jax.distributed.mesh import make_mesh
from opus_jax.influence import per_example
from opus_jax.models.loss import batch_loss, row_losses
from opus_jax.models.presets import resolve
from opus_jax.optim.preconditioner import direction
from opus_jax.training.batches import abstract_batch, window
from opus_jax.training.build import buffers_of, optimizer_for
from opus_jax.training.feed import put_rows
from opus_jax.training.scoring import is_directed
from opus_jax.training.state import abstract_state, init_state
from opus_jax.training.step import make_step

TOKENS = 16


def config(*overrides: str) -> Config:
    return from_mapping(
        {
            "model": {"preset": "tiny", "layers": 1, "width": 32, "heads": 2, "hidden": 48, "vocab_size": 64},
            "corpus": {"row_tokens": TOKENS},
            "batch": {"rows": 8},
            "proxy": {"rows": 8},
            "selection": {"warm_start_steps": 1},
            "optimizer": {"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.01},
        },
        overrides,
    )


def rows(count: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of two segments and some padding, so that rows differ in their number of targets."""
    dice = np.random.default_rng(seed)
    segments = np.ones((count, TOKENS), np.int32)
    segments[:, 9:] = 2
    for row, end in enumerate(dice.integers(12, TOKENS + 1, count)):
        segments[row, end:] = 0
    mask = (segments[:, 1:] != 0) & (segments[:, 1:] == segments[:, :-1])
    tokens = dice.integers(4, 64, (count, TOKENS)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "loss_mask": np.pad(mask, ((0, 0), (1, 0))).astype(np.float32)}


class Run:
    """A model, its state and the step, on some devices."""

    def __init__(self, config: Config, devices: int = 1):
        self.config = config
        self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
        self.spec = resolve(config.model, 64, TOKENS)
        self.optimizer = optimizer_for(self.spec, config)
        self.state = init_state(self.spec, self.optimizer, 0, self.mesh, directed=is_directed(config))
        self.step = make_step(self.spec, self.optimizer, config, self.mesh)
        self.update_step = make_step(self.spec, self.optimizer, config, self.mesh, chooses=False)

    def go(self, steps: int) -> list[dict[str, np.ndarray]]:
        """As the loop does: steps of the warm start, and between scorings, train on all their rows."""
        history, buffers = [], buffers_of(self.config)
        for i in range(steps):
            candidates = put_rows(rows(buffers.rows(i), seed=i), self.mesh)
            if buffers.chooses(i):
                proxy = put_rows(rows(self.config.proxy.rows, seed=100 + i), self.mesh)
                self.state, metrics = self.step(self.state, candidates, proxy)
            else:
                self.state, metrics = self.update_step(self.state, candidates, None)
            history.append({name: np.asarray(value) for name, value in metrics.items()})
        return history


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def largest_difference(first: Any, second: Any) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_a_step_is_what_its_parts_say() -> None:
    """Utilities, the chosen rows and the update of one scored step, recomputed with per-example gradients."""
    run = Run(config("selection.temperature=0"))
    run.go(2)
    state = host((run.state.params, run.state.opt_state, run.state.reference_gradient))
    params, opt_state, reference = jax.tree.map(jnp.asarray, state)
    candidates, proxy = ({k: jnp.asarray(v) for k, v in rows(n, s).items()} for n, s in ((16, 2), (8, 102)))
    fresh, metrics = run.step(run.state, put_rows(rows(16, 2), run.mesh), put_rows(rows(8, 102), run.mesh))

    def mean_loss(params: Any, batch: Any) -> Any:
        nats, tokens = batch_loss(run.spec, params, batch)
        return nats / tokens

    g_proxy = jax.grad(mean_loss)(params, proxy)
    v = direction(run.optimizer, opt_state, params, reference, g_proxy)
    utilities = per_example.utilities(partial(row_losses, run.spec), params, v, candidates)
    np.testing.assert_allclose(metrics["utility"], utilities, rtol=2e-3, atol=1e-6)
    best = np.sort(np.argsort(-np.asarray(utilities))[:8])
    np.testing.assert_array_equal(metrics["indices"], best)
    chosen = {name: x[best] for name, x in candidates.items()}
    gradient = jax.grad(mean_loss)(params, chosen)
    updates, _ = run.optimizer.transform.update(gradient, opt_state, params)
    assert largest_difference(host(fresh.params), host(optax.apply_updates(params, updates))) < 1e-5
    assert largest_difference(host(fresh.reference_gradient), host(gradient)) < 1e-5
    np.testing.assert_allclose(metrics["loss"], mean_loss(params, chosen), rtol=1e-5)
    assert int(metrics["update_tokens"]) == int(np.asarray(chosen["loss_mask"]).sum())


def test_a_warm_start_trains_on_all_its_rows() -> None:
    run = Run(config("selection.warm_start_steps=2"))
    history = run.go(3)
    assert ["utility" in m for m in history] == [False, False, True]
    assert history[0]["row_loss"].shape == (8,)
    assert history[2]["utility"].std() > 0
    assert not history[2]["selected_at_random"]


def test_steps_between_scorings_only_train() -> None:
    """Their updates are a plain step's, and the direction is then taken at the last one's gradient."""
    run = Run(config("selection.select_every=3"))
    history = run.go(6)
    assert ["utility" in m for m in history] == [False, True, False, False, True, False]
    plain = Run(config("selection.method=none"))
    np.testing.assert_allclose(history[0]["loss"], plain.go(1)[0]["loss"], rtol=1e-6)


def test_row_losses_are_those_of_the_trained_rows() -> None:
    run = Run(config("batch.microbatch=2"))
    run.go(1)
    params, batch = jax.tree.map(jnp.asarray, host(run.state.params)), rows(16, 1)
    _, metrics = run.step(run.state, put_rows(batch, run.mesh), put_rows(rows(8, 101), run.mesh))
    losses = row_losses(run.spec, params, {k: jnp.asarray(v) for k, v in batch.items()})
    np.testing.assert_allclose(metrics["row_loss"], losses[metrics["indices"]], rtol=1e-5)


def test_without_a_warm_start_the_first_direction_is_taken_at_a_random_batch() -> None:
    run = Run(config("selection.warm_start_steps=0"))
    (first,) = run.go(1)
    assert np.isfinite(first["utility"]).all()
    assert first["utility"].std() > 0, "at a zero reference gradient clipping would leave no direction"
    assert not first["selected_at_random"]


@pytest.mark.parametrize(
    ("optimizer", "override", "devices"),
    [
        pytest.param("muon", "batch.microbatch=2 selection.score_chunk=4", 1, marks=pytest.mark.slow),
        ("adamw", "model.remat=full", 1),
        ("adamw", "mesh.data=8", 8),
        ("muon", "mesh.fsdp=2 mesh.tensor=2", 8),
    ],
)
def test_chunks_and_meshes_change_nothing(optimizer: str, override: str, devices: int) -> None:
    """The same rows selected, and the same losses to float tolerance, as whole buffers on one device."""
    whole, split = _plain(optimizer), Run(config(f"optimizer.name={optimizer}", *override.split()), devices).go(4)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-5)
        if "z" not in a:
            continue
        np.testing.assert_allclose(a["z"], b["z"], atol=5e-3)
        np.testing.assert_array_equal(a["indices"], b["indices"])


_HISTORIES: dict[str, Any] = {}


def _plain(optimizer: str) -> Any:
    if optimizer not in _HISTORIES:
        _HISTORIES[optimizer] = Run(config(f"optimizer.name={optimizer}")).go(4)
    return _HISTORIES[optimizer]


def test_every_leaf_of_the_state_lies_on_the_mesh() -> None:
    run = Run(config("mesh.fsdp=2", "mesh.tensor=2", "optimizer.name=muon"), devices=8)
    for state in (run.state, (run.go(1), run.state)[1]):
        shardings = jax.tree.map(lambda x: x.sharding, state)
        assert all(isinstance(s, jax.sharding.NamedSharding) and s.mesh == run.mesh for s in jax.tree.leaves(shardings))
    kernel = run.state.params["blocks"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 16)
    moments = [x for x in jax.tree.leaves(run.state.opt_state) if x.shape == kernel.shape]
    assert moments
    assert all(x.sharding.shard_shape(x.shape) == (1, 16, 16) for x in moments)


def test_methods() -> None:
    """`none` trains on every row, `random` scores nothing, `high_loss` at temperature 0 takes the highest losses."""
    none = Run(config("selection.method=none")).go(1)[0]
    np.testing.assert_array_equal(none["indices"], np.arange(8))
    random = Run(config("selection.method=random")).go(1)[0]
    assert not random["utility"].any()
    assert random["selected"].sum() == 8
    run = Run(config("selection.method=high_loss", "selection.temperature=0"))
    high = run.go(2)[1]
    np.testing.assert_array_equal(high["indices"], np.sort(np.argsort(-high["utility"])[:8]))
    assert run.state.reference_gradient is None


@pytest.mark.parametrize(
    ("how", "self_term"),
    [
        ("selection.engine=per_example", 0.5),
        pytest.param("selection.redundancy_rounds=8", 0.0, marks=pytest.mark.slow),
    ],
    ids=["by the Gram matrix", "in as many rounds as picks"],
)
def test_redundancy_is_the_formula(how: str, self_term: float) -> None:
    """K U_i = <P g_i, g_proxy - (lambda / K) sum g_j> - (lambda / 2K) <P g_i, g_i>, by explicit gradients."""
    run = Run(config(how, "selection.redundancy=1.0", "selection.temperature=0"))
    run.go(2)
    params, opt_state, reference = jax.tree.map(
        jnp.asarray, host((run.state.params, run.state.opt_state, run.state.reference_gradient))
    )
    batch, proxy = ({k: jnp.asarray(v) for k, v in rows(n, s).items()} for n, s in ((16, 2), (8, 102)))
    _, metrics = run.step(run.state, put_rows(rows(16, 2), run.mesh), put_rows(rows(8, 102), run.mesh))
    gradients = per_example.per_example_gradients(partial(row_losses, run.spec), params, batch)

    def mean_loss(params: Any) -> Any:
        nats, tokens = batch_loss(run.spec, params, proxy)
        return nats / tokens

    def pulled(gradient: Any) -> np.ndarray:
        return flat(direction(run.optimizer, opt_state, params, reference, gradient))

    one = [jax.tree.map(lambda g, i=i: g[i], gradients) for i in range(16)]
    g = np.stack([flat(x) for x in one])
    gram = np.stack([pulled(x) for x in one]) @ g.T / 8  # row j: (lambda / K) P^T g_j with every g_i
    utility = g @ pulled(jax.grad(mean_loss)(params)) - self_term * np.diagonal(gram)
    left, chosen = list(range(16)), []
    for _ in range(8):
        best = max(left, key=lambda i: utility[i] - gram[chosen, i].sum())
        left.remove(best)
        chosen.append(best)
    np.testing.assert_array_equal(metrics["indices"], sorted(chosen))
    assert set(chosen) != set(np.argsort(-utility)[:8]), "otherwise this would show nothing"


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_paper_mode_samples_uniformly_and_greats_does_not() -> None:
    paper = Run(config("selection.method=paper", "optimizer.learning_rate=0.003")).go(3)[2]
    assert paper["utility"].std() > 0
    np.testing.assert_allclose(paper["probability"], 1 / 16, rtol=0.01)
    assert paper["temperature"] == np.float32(0.9)
    run = Run(config("selection.method=greats"))
    greats = run.go(2)[1]
    assert greats["selected"].sum() == 8
    assert greats["utility"][greats["selected"]].mean() > greats["utility"][~greats["selected"]].mean()


def test_the_entropy_target_sets_the_temperature() -> None:
    found = Run(config("selection.entropy=0.8")).go(2)[1]
    p = found["probability"].astype(np.float64)
    assert -(p * np.log(p)).sum() == pytest.approx(0.8 * np.log(16), abs=1e-3)
    assert found["temperature"] > 0


def test_differences_are_near_the_exact_utilities() -> None:
    whole = Run(config()).go(2)[1]["utility"]
    difference = Run(config("selection.derivative=difference")).go(2)[1]["utility"]
    np.testing.assert_allclose(difference, whole, atol=0.05 * np.abs(whole).max())
    assert (difference != whole).any()


def test_a_subset_of_the_parameters_is_the_same_for_both_engines() -> None:
    settings = ("model.layers=2", "selection.parameters=top_half")
    top = Run(config(*settings)).go(2)[1]["utility"]
    oracle = Run(config(*settings, "selection.engine=per_example")).go(2)[1]["utility"]
    np.testing.assert_allclose(top, oracle, rtol=2e-3, atol=1e-6)


def test_random_windows_lie_somewhere_else_at_every_step() -> None:
    batch = {name: jnp.asarray(x) for name, x in rows(16, 0).items()}
    first, second = (window(batch, 4, "random", jax.random.key(seed))["tokens"] for seed in (0, 1))
    assert (np.asarray(first) != np.asarray(second)).any()
    whole = np.asarray(batch["tokens"])
    for row, cut in zip(whole, np.asarray(first), strict=True):
        assert any((row[start : start + 4] == cut).all() for start in range(TOKENS - 3))
    prefix = window(batch, 4)["tokens"]
    np.testing.assert_array_equal(prefix, whole[:, :4])


@pytest.mark.slow
def test_scoring_window_sees_only_the_first_tokens() -> None:
    """With v = g_proxy a utility depends on the candidate's own tokens and on nothing else of the buffer."""

    def utilities(run: Run, tail: int) -> np.ndarray:
        batch = rows(16, 0)
        batch["tokens"][:, 8:] = tail
        run.state = init_state(run.spec, run.optimizer, 0, run.mesh, directed=True)
        _, metrics = run.step(run.state, put_rows(batch, run.mesh), put_rows(rows(8, 1), run.mesh))
        return np.asarray(metrics["utility"])

    settings = ("selection.warm_start_steps=0", "selection.direction=identity")
    windowed, whole = Run(config("selection.window=8", *settings)), Run(config(*settings))
    np.testing.assert_array_equal(utilities(windowed, 5), utilities(windowed, 60))
    assert np.abs(utilities(whole, 5) - utilities(whole, 60)).max() > 1e-4


def test_engines_agree() -> None:
    jvp = Run(config()).go(2)[1]["utility"]
    oracle = Run(config("selection.engine=per_example")).go(2)[1]["utility"]
    np.testing.assert_allclose(jvp, oracle, rtol=2e-3, atol=1e-6)


def test_lowers_for_abstract_inputs_without_allocating() -> None:
    run = Run(config("mesh.fsdp=2"), devices=8)
    state = abstract_state(run.spec, run.optimizer, run.mesh, directed=True)
    lowered = run.step.lower(state, abstract_batch(16, TOKENS, run.mesh), abstract_batch(8, TOKENS, run.mesh))
    assert lowered.compile().memory_analysis().temp_size_in_bytes > 0
