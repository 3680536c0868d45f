import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from opus_jax.influence.audit import average_ranks, rank_agreement


@pytest.mark.parametrize("seed", range(3))
def test_is_spearman_with_and_without_ties(seed):
    draw = np.random.default_rng(seed)
    for a, b in ((draw.normal(size=9), draw.normal(size=9)), (draw.integers(0, 3, 9), draw.integers(0, 4, 9))):
        ours = rank_agreement(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        assert float(ours) == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def test_ranks_are_scipys():
    x = np.array([3.0, 1.0, 3.0, 2.0, 3.0], np.float32)
    np.testing.assert_allclose(average_ranks(jnp.asarray(x)), rankdata(x) - 1)


def test_monotone_maps_do_not_matter():
    x = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    assert float(rank_agreement(x, jnp.exp(3 * x))) == pytest.approx(1)
    assert float(rank_agreement(x, -x)) == pytest.approx(-1)


def test_constant_sides_are_numbers():
    flat, x = jnp.zeros(4), jnp.arange(4.0)
    assert float(rank_agreement(flat, flat + 1)) == 1
    assert float(rank_agreement(flat, x)) == 0


def test_broken_scores_do_not_agree():
    x = jnp.arange(4.0)
    assert float(rank_agreement(x.at[3].set(jnp.nan), x)) < 0.5
