"""AdamW and Muon, each with a differentiable twin through which the selection direction is taken.

The twin has the same state as the optimizer that trains, so it can be applied to that state at any step. It differs
only where the derivative of the real update does not exist or says nothing: see `Optimizer`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from opus_jax.config import OptimizerConfig
from opus_jax.distributed.axes import LogicalAxes
from opus_jax.errors import ConfigError, UserError
from opus_jax.optim.guarded import clip_by_global_norm_guarded, scale_by_adam_guarded
from opus_jax.optim.labels import decay_mask, group_labels
from opus_jax.optim.muon import Path, scale_by_muon
from opus_jax.optim.schedules import peak_share

MUON_RMS = 0.2  # Muon's update has this root mean square times the rate, as AdamW's does (arXiv 2502.16982)


@dataclass(frozen=True)
class Optimizer:
    """What trains, and the twin that is differentiated.

    Attributes:
      transform: the optax transformation that trains.
      twin: same state structure, nearly the same update, differentiable everywhere: a floor under Adam's second moment
        (never-seen rows), clipping and Newton-Schulz guarded at zero, and unit rate where the rate is 0.
      schedule: learning rate after a number of updates.
      rates: the twin's rate of each group, 'muon' and 'adam'.
      config: the settings it was made from.
    """

    transform: optax.GradientTransformation
    twin: optax.GradientTransformation
    schedule: optax.Schedule
    rates: Mapping[str, optax.Schedule]
    config: OptimizerConfig


AnyOptimizer = Optimizer | optax.GradientTransformation | optax.MultiSteps


def make_optimizer(
    config: OptimizerConfig, steps: int, params_like: PyTree[Any], logical_axes: PyTree[Any] = None
) -> Optimizer:
    """Build the configured optimizer.

    Args:
      config: `name` adamw or muon, rates, decay, clipping.
      steps: updates in the whole run.
      params_like: parameters, or their shapes and types. Muon takes the leaves called 'kernel' of rank 3 under
        'blocks', [L, in, out], each layer by itself; everything else is AdamW's.
      logical_axes: tree like the parameters, with a tuple of names in place of each leaf; with it Muon works on whole
        matrices on any mesh (see `dealt.py`).

    Raises:
      ConfigError: `name` is unknown, or Muon finds no stacked block matrix.
      UserError: parameters narrower than float32, in which second moments stall (they take the parameter's type).
    """
    _check_types(params_like)
    if config.name == "muon" and "muon" not in jax.tree.leaves(group_labels(params_like)):
        raise ConfigError("optimizer.name", "muon", "needs stacked kernels [L, in, out] under 'blocks'; use adamw")
    rates, unit_rates = _rates(config, steps), _rates(config, steps, unit_where_zero=True)
    axes = {} if logical_axes is None else axes_by_path(params_like, logical_axes)
    core: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": _adamw, "muon": partial(_muon, axes=axes)}
    if config.name not in core:
        raise ConfigError("optimizer.name", config.name, f"must be one of {', '.join(core)}")
    clip = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    guarded_clip = [] if config.clip is None else [clip_by_global_norm_guarded(config.clip)]
    return Optimizer(
        transform=optax.chain(*clip, core[config.name](config, rates, twin=False)),
        twin=optax.chain(*guarded_clip, core[config.name](config, unit_rates, twin=True)),
        schedule=rates["muon" if config.name == "muon" else "adam"],
        rates=unit_rates,
        config=config,
    )


def opt_state_logical_axes(optimizer: AnyOptimizer, params_like: PyTree[Any], logical_axes: PyTree[Any]) -> PyTree[Any]:
    """Logical axes of every leaf of the optimizer state: a moment's are its parameter's, a scalar's are ().

    Without them `jit(init)` leaves the moments replicated on every device.

    Args:
      optimizer: any optax transformation will do as well.
      params_like: parameters or their shapes.
      logical_axes: tree like the parameters, with a tuple of names in place of each leaf.

    Returns:
      Tree with the structure of the optimizer state and tuples as leaves.
    """
    names_at = axes_by_path(params_like, logical_axes)
    owner = {path: (x.shape, names_at[path]) for path, x in jax.tree_util.tree_leaves_with_path(params_like)}

    def axes_of(path: tuple[Any, ...], leaf: Any) -> tuple[Any, ...]:
        for start in range(len(path) + 1):  # the longest suffix that is a parameter's path
            shape, names = owner.get(path[start:], (None, ()))
            if shape == leaf.shape:
                return tuple(names)
        return ()

    init = optimizer.transform.init if isinstance(optimizer, Optimizer) else optimizer.init  # type: ignore[attr-defined]
    return jax.tree_util.tree_map_with_path(axes_of, jax.eval_shape(init, params_like))


def axes_by_path(params_like: PyTree[Any], logical_axes: PyTree[Any]) -> dict[Path, LogicalAxes]:
    """The tuple of names in place of every leaf, by the leaf's path."""
    structure: Any = jax.tree.structure(params_like)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params_like)]
    return dict(zip(paths, structure.flatten_up_to(logical_axes), strict=True))


# ------------------------------------------------------------------------------------------------ parts


def _adamw(config: OptimizerConfig, rates: Mapping[str, optax.Schedule], *, twin: bool) -> optax.GradientTransformation:
    scale = scale_by_adam_guarded if twin else optax.scale_by_adam
    return optax.chain(
        scale(b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, None if config.decay_all else decay_mask),
        optax.scale_by_learning_rate(rates["adam"]),
    )


def _muon(
    config: OptimizerConfig, rates: Mapping[str, optax.Schedule], *, twin: bool, axes: Mapping[Path, LogicalAxes]
) -> optax.GradientTransformation:
    """Muon on the stacked block matrices, plain AdamW on the rest.

    Composed here rather than by `optax.contrib.muon`, whose Adam half inherits Nesterov's flag (NAdam), b2 = 0.999 and
    a decay without a mask.
    """
    block_matrices = optax.chain(
        scale_by_muon(beta=config.momentum, mu_dtype=jnp.float32, axes=axes, guarded=twin),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: muon_scale(u.shape) * u, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rates["muon"]),
    )
    return optax.partition({"muon": block_matrices, "adam": _adamw(config, rates, twin=twin)}, group_labels)


def muon_scale(shape: tuple[int, ...]) -> float:
    """Factor on an orthogonalised [.., in, out] update that gives it a root mean square of about MUON_RMS."""
    return MUON_RMS * max(shape[-2:]) ** 0.5


def _rates(config: OptimizerConfig, steps: int, *, unit_where_zero: bool = False) -> Mapping[str, optax.Schedule]:
    """Rate of each group. At rate 0 the twin uses 1 for the faster group and keeps the groups' proportion."""
    share = peak_share(config, steps)
    muon = config.learning_rate
    adam = muon if config.name == "adamw" or config.adam_learning_rate is None else config.adam_learning_rate
    peak = max(muon, adam)

    def rate(group: float) -> optax.Schedule:
        unit = group / peak if peak > 0 else 1.0
        if not unit_where_zero:
            return lambda step: group * share(step)
        return lambda step: jnp.where(peak * share(step) > 0, group * share(step), unit)

    return {"muon": rate(muon), "adam": rate(adam)}


def _check_types(params_like: PyTree[Any]) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params_like)[0]:
        if jnp.finfo(leaf.dtype).bits < 32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"parameter {name} is {leaf.dtype}: keep float32 parameters and cast in the forward pass")
