"""From a configuration to the parts of a run: what `train`, `evaluate`, `generate`, `compile` and benchmarks share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from opus_jax.config import Config
from opus_jax.data.buffers import Buffers, every_step
from opus_jax.data.plan import Plan
from opus_jax.data.prepare import prepare
from opus_jax.data.proxy_rows import proxy_plan, target_domains
from opus_jax.data.records import Manifest, RowReader
from opus_jax.data.tokenizer import Tokenizer, load_tokenizer
from opus_jax.distributed.mesh import batch_shards, make_mesh
from opus_jax.errors import ConfigError
from opus_jax.evaluation.bits_per_byte import Evaluator, make_evaluator
from opus_jax.models import transformer
from opus_jax.models.presets import ModelSpec, resolve
from opus_jax.optim.optimizers import Optimizer, make_optimizer
from opus_jax.training.audit import make_audit
from opus_jax.training.offer import Reader, candidate_reader, first_plan, make_steering
from opus_jax.training.scoring import SCORING_METHODS, is_directed
from opus_jax.training.state import TrainState, abstract_state
from opus_jax.training.steering import Steering
from opus_jax.training.step import Step, make_step


@dataclass(frozen=True)
class Parts:
    """The parts of one run. Those that compile or read data are made when first used."""

    config: Config
    records: Path
    manifest: Manifest
    tokenizer: Tokenizer
    spec: ModelSpec
    optimizer: Optimizer
    mesh: Mesh
    progress: bool = True

    @cached_property
    def step(self) -> Step:
        return make_step(self.spec, self.optimizer, self.config, self.mesh)

    @cached_property
    def update_step(self) -> Step:
        """The step that does not choose: for warm starts, and between two scorings."""
        return make_step(self.spec, self.optimizer, self.config, self.mesh, chooses=False)

    @property
    def buffers(self) -> Buffers:
        return buffers_of(self.config)

    @cached_property
    def audit(self) -> Any:
        return make_audit(self.spec, self.optimizer, self.config, self.mesh)

    @cached_property
    def evaluate(self) -> Evaluator:
        reader = self.reader("validation")
        return make_evaluator(
            self.spec, self.mesh, reader, self.manifest, self.tokenizer.token_bytes, self.config.evaluation
        )

    @property
    def directed(self) -> bool:
        return is_directed(self.config)

    @property
    def targets(self) -> list[str]:
        """Domains whose bits per byte are the target: the proxy's, or all."""
        return target_domains(self.manifest, self.config)

    def evaluate_target(self, params: Any) -> tuple[dict[str, float], float]:
        """Bits per byte by domain, and over the target domains."""
        bits = self.evaluate(params)
        return bits, self.evaluate.target(bits, self.targets)

    def abstract_state(self) -> TrainState:
        return abstract_state(self.spec, self.optimizer, self.mesh, directed=self.directed)

    def reader(self, split: str) -> RowReader:
        return RowReader(self.records, split, lenient=self.config.corpus.lenient)

    @cached_property
    def candidate_reader(self) -> Reader:
        """Rows of the training split, and of the proxy where these are trained on too."""
        return candidate_reader(self.records, self.manifest, self.config)

    def candidate_plan(self) -> Plan:
        """The plan of step 0."""
        return first_plan(self.candidate_reader, self.records, self.manifest, self.config)

    def steering(self) -> Steering:
        """The plans of a run that begins."""
        plan, reader = self.candidate_plan(), self.candidate_reader
        return make_steering(
            plan, reader, self.records, self.manifest, self.config, self.buffers, progress=self.progress
        )

    def proxy_plan(self) -> Plan:
        return proxy_plan(self.manifest, self.config)


def build(config: Config, *, progress: bool = True) -> Parts:
    """Prepare the corpus if that is still to be done, and resolve model, optimizer and mesh.

    Raises:
      UserError: anything in the configuration that cannot be had, before anything is compiled.
    """
    mesh = make_mesh(config.mesh)
    check_rows(config, mesh)
    check_kernel(config, mesh)
    resolve(config.model, config.model.vocab_size or 1, config.corpus.row_tokens)  # preparing can take minutes
    records = prepare(config, progress=progress)
    manifest = Manifest.load(records)
    tokenizer = load_tokenizer(records)
    spec = resolve(config.model, tokenizer.vocab_size, config.corpus.row_tokens)
    return Parts(config, records, manifest, tokenizer, spec, optimizer_for(spec, config), mesh, progress)


def optimizer_for(spec: ModelSpec, config: Config) -> Optimizer:
    """The configured optimizer, fitted to the model's parameters."""
    shapes = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    return make_optimizer(config.optimizer, config.run.steps, shapes, transformer.logical_axes(spec))


def buffers_of(config: Config) -> Buffers:
    """How many rows each step takes: methods that score choose after the warm start, every `select_every` steps."""
    selection = config.selection
    if selection.method not in SCORING_METHODS:
        return every_step(config.candidates)
    return Buffers(config.candidates, config.batch.rows, selection.warm_start_steps, selection.select_every)


def check_rows(config: Config, mesh: Mesh) -> None:
    """Every batch of rows must split evenly over the mesh."""
    shards = batch_shards(mesh)
    micro = config.batch.microbatch or config.batch.rows
    rows = {
        "batch.rows": config.batch.rows,
        "batch.microbatch": micro,
        "evaluation.batch_rows": config.evaluation.batch_rows,
    }
    if config.selection.method != "none":
        rows["batch.rows / selection.ratio"] = config.candidates
    if is_directed(config):
        rows["proxy.rows"] = config.proxy.rows
    if config.selection.sketch is not None and config.selection.score_chunk is not None:
        rows["selection.score_chunk"] = config.selection.score_chunk
    for key, count in rows.items():
        if count % shards:
            raise ConfigError(key, count, f"must be a multiple of the {shards} data shards of the mesh")


def check_kernel(config: Config, mesh: Mesh) -> None:
    """Asked for, a kernel must be able to run: better said now than after the warm start."""
    platform = mesh.devices.flat[0].platform
    if config.selection.kernel == "pallas" and platform != "tpu":
        raise ConfigError(
            "selection.kernel", "pallas", f"is for TPUs, and the mesh is of {platform} devices: set it to xla or null"
        )
