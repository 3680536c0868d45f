"""What a step costs, in FLOPs: analytic matrix products and attention, a multiply-add counted as two.

F is one forward pass of one row. Training costs 3F per row whatever is recomputed by remat; scoring by forward mode
costs 3F per scored row of the window's length. The optimizer's own arithmetic is not counted, the direction's is.
"""

from dataclasses import dataclass

import jax

from opus_jax.config import Config
from opus_jax.models import transformer
from opus_jax.models.flops import forward_flops
from opus_jax.models.presets import ModelSpec
from opus_jax.training.step import is_directed

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of the parts of one step."""

    update: int
    proxy: int  # of a step that refreshes the proxy gradient
    direction: int
    scoring: int
    audit: int

    def selection(self, step: int, config: Config) -> int:
        """Scoring, proxy and direction at a step (counted from 0)."""
        warm = config.selection.warm_start_steps
        if step < warm:
            return 0
        refreshes = (step - warm) % config.proxy.refresh == 0
        first_reference = self.update if is_directed(config) and warm == 0 and step == 0 else 0
        return self.direction + self.scoring + self.proxy * refreshes + first_reference


def step_costs(spec: ModelSpec, config: Config) -> StepCosts:
    """Costs of one step of a configured run."""
    row = forward_flops(spec, config.corpus.row_tokens)
    windowed = forward_flops(spec, config.selection.window or config.corpus.row_tokens)
    directed = is_directed(config)
    per_scored_row = {"opus": 3 * windowed, "high_loss": windowed}.get(config.selection.method, 0)
    direction = _direction_flops(spec, config) if directed else 0
    proxy = 3 * row * config.proxy.rows if directed else 0
    return StepCosts(
        update=3 * row * config.batch.rows,
        proxy=proxy,
        direction=direction,
        scoring=per_scored_row * config.candidates,
        audit=proxy + direction + 3 * (windowed + row) * config.selection.audit_rows if directed else 0,
    )


def _direction_flops(spec: ModelSpec, config: Config) -> int:
    """Only Muon's direction has matrix products: Newton-Schulz forward and backward, or the one-step S."""
    if config.optimizer.name != "muon" or config.selection.direction in ("identity", "adamw_frozen"):
        return 0
    shapes = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    kernels = [x.shape for x in jax.tree.leaves(shapes["blocks"]) if x.ndim == 3]
    if config.selection.direction == "muon_frozen":
        return sum(layers * _frozen_factor(a, b) for layers, a, b in kernels)
    return sum(3 * NEWTON_SCHULZ_STEPS * layers * _newton_schulz(min(a, b), max(a, b)) for layers, a, b in kernels)


def _newton_schulz(m: int, n: int) -> int:
    """X (m x n) -> aX + (bA + cA^2)X with A = X X^T."""
    return 2 * m * m * n + 2 * m**3 + 2 * m * m * n


def _frozen_factor(fan_in: int, fan_out: int) -> int:
    """S = aI + bA + cA^2 with A = q q^T (out x out), and one product with S."""
    return 2 * fan_out**2 * fan_in + 2 * fan_out**3 + 2 * fan_out**2 * fan_in
