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
