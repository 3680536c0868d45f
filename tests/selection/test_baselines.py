import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.errors import UserError
from opus_jax.selection import METHODS

KEY = jax.random.key(0)
SCORES = jnp.asarray(np.random.default_rng(0).normal(size=16), jnp.float32)


@pytest.mark.parametrize("name", METHODS)
def test_one_interface_under_jit(name):
    k = 16 if name == "none" else 4
    indices, diagnostics = jax.jit(lambda s, key: METHODS[name](s, k, temperature=0.5, key=key))(SCORES, KEY)
    assert indices.dtype == jnp.int32
    assert indices.shape == (k,)
    assert np.all(np.diff(indices) > 0)
    assert {name: x.shape for name, x in diagnostics.items()} == {
        "z": (16,),
        "probability": (16,),
        "degenerate": (),
        "nonfinite": (),
        "redundancy": (16,),
        "temperature": (),
    }
    assert float(diagnostics["probability"].sum()) == pytest.approx(1, rel=1e-5)


def test_random_ignores_scores_and_temperature():
    picks = [METHODS["random"](s, 4, temperature=t, key=KEY) for s, t in ((SCORES, 0.0), (100 * SCORES, 0.5))]
    np.testing.assert_array_equal(picks[0][0], picks[1][0])
    assert not bool(picks[0][1]["degenerate"])
    np.testing.assert_allclose(picks[0][1]["probability"], np.full(16, 1 / 16), rtol=1e-6)


def test_high_loss_at_zero_takes_the_highest():
    indices, _ = METHODS["high_loss"](SCORES, 4, temperature=0.0, key=KEY)
    assert set(indices.tolist()) == set(np.argsort(SCORES)[-4:].tolist())


def test_none_takes_every_row_in_order():
    indices, _ = METHODS["none"](SCORES, 16, temperature=0.5, key=KEY)
    np.testing.assert_array_equal(indices, np.arange(16))
    with pytest.raises(UserError, match="use random"):
        METHODS["none"](SCORES, 4, temperature=0.5, key=KEY)


def test_mid_loss_at_zero_takes_those_nearest_the_median():
    indices, _ = METHODS["mid_loss"](SCORES.at[0].set(jnp.nan), 4, temperature=0.0, key=KEY)
    finite = np.asarray(SCORES)[1:]
    nearest = 1 + np.argsort(np.abs(finite - np.median(finite)))[:4]
    assert set(indices.tolist()) == set(nearest.tolist())


def test_mid_loss_takes_the_losses_nearest_the_median():
    losses = jnp.array([0.1, 9.0, 3.0, 2.9, 5.0, 1.0, jnp.nan, 3.15, jnp.inf, 3.1])
    indices, found = jax.jit(lambda s: METHODS["mid_loss"](s, 3, temperature=0.0, key=KEY))(losses)
    np.testing.assert_array_equal(indices, [2, 7, 9])  # the median of the eight finite losses is 3.05
    assert int(found["nonfinite"]) == 2
    assert not bool(found["degenerate"])


def test_mid_loss_prefers_the_middle_at_any_temperature():
    losses = jnp.linspace(1.0, 5.0, 17)
    _, found = METHODS["mid_loss"](losses, 4, temperature=0.5, key=KEY)
    assert int(found["probability"].argmax()) == 8
    np.testing.assert_allclose(found["probability"], found["probability"][::-1], rtol=1e-4)
    assert np.all(np.diff(found["probability"][:9]) > 0)


@pytest.mark.parametrize(("name", "follows"), [("high_loss", True), ("mid_loss", True), ("random", False)])
def test_an_entropy_target_rules_every_method_that_looks_at_scores(name, follows):
    _, found = METHODS[name](SCORES, 4, temperature=0.5, key=KEY, entropy=0.3)
    p = np.asarray(found["probability"], np.float64)
    assert -(p * np.log(p)).sum() == pytest.approx((0.3 if follows else 1.0) * np.log(16), abs=2e-3)
