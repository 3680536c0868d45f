"""What a step costs, in FLOPs: analytic matrix products and attention, a multiply-add counted as two.

F is one forward pass of one row. Training costs 3F per row whatever is recomputed by remat; scoring by forward mode
costs F and twice the part of F whose parameters move, per scored row of the window's length; the ghost engine and
sketches are counted in `pair_costs`. The optimizer's own arithmetic is not counted, the direction's is.
"""

from dataclasses import dataclass

import jax

from opus_jax.config import Config
from opus_jax.data.buffers import Buffers
from opus_jax.influence.low_rank import factor_flops
from opus_jax.models import transformer
from opus_jax.models.flops import difference_flops, forward_flops, low_rank_flops, moving_flops, moving_maps
from opus_jax.models.presets import ModelSpec
from opus_jax.models.thin import pays
from opus_jax.training.audit import approximates_products, with_exact_products
from opus_jax.training.pair_costs import PairCosts, weight_products
from opus_jax.training.scoring import DIRECTED_METHODS, LOSS_METHODS, is_directed

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of the parts of one step."""

    update: int
    proxy: int  # of a step that refreshes the proxy gradient
    direction: int
    scoring: int
    redundancy: int
    audit: int
    spared: int = 0  # of the update, at steps that choose: `selection.shared` has done it in scoring

    def training(self, step: int, buffers: Buffers) -> int:
        """The update at a step (counted from 0)."""
        return self.update - self.spared * buffers.chooses(step)

    def selection(self, step: int, config: Config, buffers: Buffers) -> int:
        """Proxy, direction, scoring and redundancy at a step (counted from 0)."""
        if not buffers.chooses(step):
            return 0
        settings = config.selection
        refreshes = (step - buffers.first) // buffers.every % config.proxy.refresh == 0
        references = is_directed(config) and settings.warm_start_steps == 0 and step == 0
        return self.direction + self.scoring + self.redundancy + self.proxy * refreshes + self.update * int(references)


def step_costs(spec: ModelSpec, config: Config) -> StepCosts:
    """Costs of one step of a configured run."""
    row = forward_flops(spec, config.corpus.row_tokens)
    settings, directed = config.selection, is_directed(config)
    scored_row = _scored_row(spec, config)
    direction = _direction_flops(spec, config) + _factor_flops(spec, config) if settings.method == "opus" else 0
    of_proxy = forward_flops(spec, config.proxy.window or config.corpus.row_tokens)
    proxy = 3 * of_proxy * config.proxy.rows if directed else 0
    left = weight_products(spec, config.corpus.row_tokens, "all")  # of the update, with factors at hand
    return StepCosts(
        update=3 * row * config.batch.rows,
        proxy=proxy,
        direction=direction,
        scoring=scored_row * config.candidates + PairCosts(spec, config).proxy(config.candidates),
        redundancy=_redundancy_flops(spec, config, scored_row, direction),
        audit=proxy + direction + _audit_flops(spec, config, scored_row) if settings.method == "opus" else 0,
        spared=(3 * row - left) * config.batch.rows if settings.shared else 0,
    )


def _audit_flops(spec: ModelSpec, config: Config, scored_row: int) -> int:
    """The rows as they are scored, and their gradients one by one; their products too, where these are audited."""
    settings, rows = config.selection, config.selection.audit_rows
    row = forward_flops(spec, config.corpus.row_tokens)
    used = PairCosts(spec, config)
    total = (scored_row + 3 * row) * rows + used.proxy(rows)
    if not approximates_products(settings):
        return total
    exact = PairCosts(spec, with_exact_products(config))
    return total + used.products(rows) + exact.scored_row() * rows + exact.products(rows)


def _scored_row(spec: ModelSpec, config: Config) -> int:
    """FLOPs of scoring one candidate."""
    settings = config.selection
    tokens = settings.window or config.corpus.row_tokens
    forward = forward_flops(spec, tokens)
    if settings.method in LOSS_METHODS:
        return forward
    if settings.method not in DIRECTED_METHODS:
        return 0
    if settings.method in ("paper", "greats") or settings.engine == "ghost" or settings.sketch is not None:
        return PairCosts(spec, config).scored_row()
    if settings.engine == "directional" and settings.derivative == "difference":
        return difference_flops(spec, tokens, settings.parameters)
    if settings.rank is not None:
        return low_rank_flops(spec, tokens, settings.parameters, settings.rank)
    return forward + 2 * moving_flops(spec, tokens, settings.parameters)


def _redundancy_flops(spec: ModelSpec, config: Config, scored_row: int, direction: int) -> int:
    """Rounds: the chosen rows' gradients, a direction and a scoring each. Otherwise products of all pairs."""
    settings, candidates = config.selection, config.candidates
    if not (settings.method in ("paper", "greats") or (settings.method == "opus" and settings.redundancy)):
        return 0
    row = forward_flops(spec, settings.window or config.corpus.row_tokens)
    if settings.engine == "directional" and settings.method == "opus":
        chosen = 3 * row * config.batch.rows // settings.redundancy_rounds
        return (settings.redundancy_rounds - 1) * (chosen + direction + scored_row * candidates)
    if settings.engine == "per_example" and settings.method == "opus" and settings.sketch is None:
        return candidates * (3 * row + direction) + 2 * candidates**2 * transformer.parameter_count(spec)
    return PairCosts(spec, config).products(candidates)


def _kernels(spec: ModelSpec) -> list[tuple[int, ...]]:
    """[L, in, out] of the blocks' matrices."""
    shapes = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    return [x.shape for x in jax.tree.leaves(shapes["blocks"]) if x.ndim == 3]


def _direction_flops(spec: ModelSpec, config: Config) -> int:
    """Only Muon's direction has matrix products: Newton-Schulz forward and backward, or the one-step S."""
    if config.optimizer.name != "muon" or config.selection.direction in ("identity", "adamw_frozen"):
        return 0
    kernels = _kernels(spec)
    if config.selection.direction == "muon_frozen":
        return sum(layers * _frozen_factor(a, b) for layers, a, b in kernels)
    return sum(3 * NEWTON_SCHULZ_STEPS * layers * _newton_schulz(min(a, b), max(a, b)) for layers, a, b in kernels)


def _factor_flops(spec: ModelSpec, config: Config) -> int:
    """Thin factors of the direction's matrices, where they save anything."""
    rank, maps = config.selection.rank, moving_maps(spec, config.selection.parameters)
    return 0 if rank is None else sum(factor_flops(shape, rank) for shape in maps if pays(shape, rank))


def _newton_schulz(m: int, n: int) -> int:
    """X (m x n) -> aX + (bA + cA^2)X with A = X X^T."""
    return 2 * m * m * n + 2 * m**3 + 2 * m * m * n


def _frozen_factor(fan_in: int, fan_out: int) -> int:
    """S = aI + bA + cA^2 with A = q q^T (out x out), and one product with S."""
    return 2 * fan_out**2 * fan_in + 2 * fan_out**3 + 2 * fan_out**2 * fan_in
