"""Learning-rate schedules: linear warm-up, then a constant, cosine, linear or warm-up-stable-decay course.

The first update (step 0) already moves: warm-up of W updates gives peak * (step + 1) / W, so the peak is reached at
step W - 1 and no batch is spent at rate 0. The last update (step `steps` - 1) has the rate `final_share` * peak,
except for `constant`.
"""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from opus_jax.config import OptimizerConfig
from opus_jax.errors import ConfigError


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates already done.

    Args:
      config: `learning_rate` is the peak; `schedule`, `warmup_steps`, `decay_share` and `final_share` give the course.
      steps: updates in the whole run, warm-up included.

    Returns:
      `schedule(step) -> rate`; float32 for an integer step or an array of them.

    Raises:
      ConfigError: the schedule's name is unknown.
    """
    share = peak_share(config, steps)
    return lambda step: config.learning_rate * share(step)


def peak_share(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The schedule as a share of the peak rate, common to all groups of parameters."""
    courses = {"constant": _constant, "cosine": _cosine, "linear": _linear, "wsd": _wsd}
    if config.schedule not in courses:
        raise ConfigError("optimizer.schedule", config.schedule, f"must be one of {', '.join(courses)}")
    course = courses[config.schedule](config)
    warmup = config.warmup_steps
    last = max(steps - 1 - warmup, 1)

    def share(step: ArrayLike) -> Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / last, 0.0, 1.0)
        rising = (step + 1) / max(warmup, 1)
        return jnp.where(step < warmup, rising, course(progress))

    return share


Course = Callable[[Array], Array]  # share of the steps after warm-up -> share of the peak


def _constant(config: OptimizerConfig) -> Course:
    return jnp.ones_like


def _cosine(config: OptimizerConfig) -> Course:
    final = config.final_share
    return lambda progress: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _linear(config: OptimizerConfig) -> Course:
    return lambda progress: 1 - (1 - config.final_share) * progress


def _wsd(config: OptimizerConfig) -> Course:
    """Constant until the last `decay_share` of the steps after warm-up, then linear (arXiv 2404.06395)."""
    start, length = 1 - config.decay_share, max(config.decay_share, 1e-9)
    return lambda progress: 1 - (1 - config.final_share) * jnp.clip((progress - start) / length, 0.0, 1.0)
