import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opus_jax.config import OptimizerConfig
from opus_jax.errors import ConfigError
from opus_jax.optim.schedules import make_schedule

STEPS = 100


def rates(**settings):
    config = OptimizerConfig(**({"learning_rate": 2.0, "warmup_steps": 10, "final_share": 0.1} | settings))
    return np.asarray(make_schedule(config, STEPS)(jnp.arange(STEPS)))


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_warms_up_from_a_first_step_that_moves(name):
    course = rates(schedule=name)
    np.testing.assert_allclose(course[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    assert course[10] == pytest.approx(2.0)
    assert np.all(np.diff(course[10:]) <= 1e-6)


@pytest.mark.parametrize(("name", "last"), [("constant", 2.0), ("cosine", 0.2), ("linear", 0.2), ("wsd", 0.2)])
def test_ends_at_the_final_share(name, last):
    assert rates(schedule=name)[-1] == pytest.approx(last, rel=1e-5)


def test_each_course_has_its_own_middle():
    middle = 10 + 89 // 2
    assert rates(schedule="linear")[middle] == pytest.approx(2 * (1 - 0.9 * 44 / 89), rel=1e-5)
    assert rates(schedule="cosine")[middle] == pytest.approx(0.2 + 0.9 * (1 + np.cos(np.pi * 44 / 89)), rel=1e-5)
    assert rates(schedule="wsd")[middle] == pytest.approx(2.0)


def test_wsd_decays_over_its_share_only():
    course = rates(schedule="wsd", decay_share=0.5)
    assert course[10 + 44] == pytest.approx(2.0)
    assert course[10 + 46] < 2.0
    np.testing.assert_allclose(np.diff(course, 2)[60:], 0, atol=1e-5)


def test_no_warm_up_starts_at_the_peak():
    assert rates(warmup_steps=0)[0] == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_one_step_and_warm_up_longer_than_the_run_are_finite(name):
    config = OptimizerConfig(schedule=name, warmup_steps=20)
    assert np.isfinite(make_schedule(config, 1)(0))
    assert np.isfinite(make_schedule(config, 10)(9))


def test_wsd_without_decay_share_is_finite():
    assert np.all(np.isfinite(rates(schedule="wsd", decay_share=0.0)))


def test_works_on_traced_steps_and_scalars():
    schedule = make_schedule(OptimizerConfig(), STEPS)
    assert float(jax.jit(schedule)(jnp.int32(7))) == pytest.approx(float(schedule(7)))


def test_unknown_name_says_what_is_allowed():
    with pytest.raises(ConfigError, match=r"optimizer\.schedule.*constant, cosine, linear, wsd"):
        make_schedule(OptimizerConfig(schedule="steps"), STEPS)
