import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.influence.proxy import update_proxy_gradient


def run(steps, *, first_step=0, **settings):
    """Proxy gradients in use when the fresh one at step t is t + 1, starting from rubbish."""
    update = jax.jit(
        lambda g, t: update_proxy_gradient(g, t, lambda: {"w": t + jnp.ones(2)}, first_step=first_step, **settings)
    )
    gradient, used = {"w": jnp.full(2, 1e6)}, []
    for step in range(first_step, first_step + steps):
        gradient = update(gradient, jnp.int32(step))
        used.append(float(gradient["w"][0]))
    return used


def test_fresh_every_step_by_default():
    assert run(3) == [1, 2, 3]


def test_kept_between_refreshes():
    assert run(5, refresh=2) == [1, 1, 3, 3, 5]


def test_refreshes_count_from_the_first_step():
    assert run(4, refresh=3, first_step=20) == [21, 21, 21, 24]


@pytest.mark.parametrize("first_step", [0, 7])
def test_average_starts_without_bias(first_step):
    used = run(6, ema=0.9, first_step=first_step)
    for k in range(6):
        weights = 0.9 ** np.arange(k, -1, -1)
        assert used[k] == pytest.approx(first_step + weights @ np.arange(1, k + 2) / weights.sum(), rel=1e-5)


def test_average_and_refresh_together():
    used = run(5, ema=0.5, refresh=2)
    assert used == pytest.approx([1, 1, (3 + 0.5) / 1.5, (3 + 0.5) / 1.5, (5 + 1.5 + 0.25) / 1.75], rel=1e-5)


def test_nothing_is_computed_on_the_steps_between():
    calls = []

    def fresh():
        jax.debug.callback(lambda: calls.append(1))
        return jnp.ones(2)

    update = jax.jit(lambda g, t: update_proxy_gradient(g, t, fresh, refresh=4))
    for step in range(8):
        update(jnp.zeros(2), step)
    jax.effects_barrier()
    assert len(calls) == 2
