import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.selection.opus import select

KEY = jax.random.key(0)
UTILITIES = jnp.asarray(np.random.default_rng(0).normal(size=32), jnp.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_scale_and_shift_do_not_matter(scale):
    indices, diagnostics = select(UTILITIES, 8, temperature=0.5, key=KEY)
    scaled, scaled_diagnostics = select(scale * UTILITIES, 8, temperature=0.5, key=KEY)
    np.testing.assert_array_equal(indices, scaled)
    np.testing.assert_allclose(diagnostics["z"], scaled_diagnostics["z"], rtol=1e-4, atol=1e-5)
    shifted, _ = select(UTILITIES + 5, 8, temperature=0.5, key=KEY)
    np.testing.assert_array_equal(indices, shifted)


def test_diagnostics_are_z_scores_and_first_draw_probabilities():
    _, diagnostics = select(UTILITIES, 8, temperature=0.5, key=KEY)
    u = np.asarray(UTILITIES, np.float64)
    z = (u - u.mean()) / u.std()
    np.testing.assert_allclose(diagnostics["z"], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(diagnostics["probability"], np.exp(2 * z) / np.exp(2 * z).sum(), rtol=1e-4)
    assert diagnostics["z"].dtype == jnp.float32
    assert not bool(diagnostics["degenerate"])


def test_lower_temperature_picks_better():
    keys = jax.random.split(KEY, 200)

    def mean_utility(temperature):
        pick = jax.jit(
            jax.vmap(lambda key: UTILITIES[select(UTILITIES, 8, temperature=temperature, key=key)[0]].mean())
        )
        return float(pick(keys).mean())

    means = [mean_utility(t) for t in (0.0, 0.25, 1.0, math.inf)]
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(float(UTILITIES.mean()), abs=0.1)


@pytest.mark.parametrize("temperature", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("value", [0.0, 0.1, -7e20])
def test_equal_utilities_are_chosen_at_random_and_said_so(temperature, value):
    equal = jnp.full(16, value)
    picks = {tuple(select(equal, 4, temperature=temperature, key=jax.random.key(s))[0].tolist()) for s in range(8)}
    assert len(picks) > 1
    _, diagnostics = select(equal, 4, temperature=temperature, key=KEY)
    assert bool(diagnostics["degenerate"])
    assert np.all(diagnostics["z"] == 0)
    np.testing.assert_allclose(diagnostics["probability"], np.full(16, 1 / 16))


@pytest.mark.parametrize("temperature", [0.0, 0.5, math.inf])
def test_broken_utilities_come_last_and_are_counted(temperature):
    broken = UTILITIES[:6].at[jnp.array([1, 4])].set(jnp.array([jnp.nan, jnp.inf]))
    indices, diagnostics = select(broken, 4, temperature=temperature, key=KEY)
    np.testing.assert_array_equal(indices, [0, 2, 3, 5])
    assert int(diagnostics["nonfinite"]) == 2
    assert np.all(np.isfinite(diagnostics["z"]))
    assert float(diagnostics["z"][1]) == float(diagnostics["z"].min())
    assert np.all(np.isfinite(diagnostics["probability"]))
    assert float(diagnostics["probability"][1]) == 0


def test_nothing_finite_is_random():
    picks = {
        tuple(select(jnp.full(16, jnp.nan), 4, temperature=0.0, key=jax.random.key(s))[0].tolist()) for s in range(4)
    }
    assert len(picks) > 1
    _, diagnostics = select(jnp.full(16, jnp.nan), 4, temperature=0.5, key=KEY)
    assert bool(diagnostics["degenerate"])
    np.testing.assert_allclose(diagnostics["probability"], np.full(16, 1 / 16))


def test_permuting_candidates_permutes_probabilities():
    order = np.random.default_rng(1).permutation(32)
    _, straight = select(UTILITIES, 8, temperature=0.5, key=KEY)
    _, permuted = select(UTILITIES[order], 8, temperature=0.5, key=KEY)
    np.testing.assert_allclose(permuted["probability"], straight["probability"][order], rtol=1e-4)


def test_the_published_raw_temperature_is_uniform_sampling():
    """Scores of the paper's size (0.0033 to 0.0059) at its temperature 0.9, against ours on z-scores."""
    raw = jnp.linspace(0.0033, 0.0059, 32)
    paper = jax.nn.softmax(raw / 0.9)
    assert float(paper.max() / paper.min()) < 1.003
    _, ours = select(raw, 16, temperature=0.9, key=KEY)
    assert float(ours["probability"].max() / ours["probability"].min()) > 10
