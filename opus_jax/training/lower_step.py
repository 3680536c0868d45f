"""Lower the real steps for the devices of a TPU slice that is not there: training, scoring a corpus, writing text.

`python -m opus_jax.training.lower_step` is the child process of `opus-jax compile`: it reads a request from standard
input and writes the figures to standard output, each as one JSON object.
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opus_jax.config import Config, from_mapping, replace
from opus_jax.data.packing import segments_per_row
from opus_jax.data.tokenizer import byte_tokenizer, sentencepiece_tokenizer
from opus_jax.data.tokenizer_training import read_model
from opus_jax.distributed.axes import replicated
from opus_jax.distributed.compile import STEPS
from opus_jax.distributed.measure import Lowered, measure
from opus_jax.distributed.mesh import make_mesh
from opus_jax.distributed.topology import absent_devices, parse_topology
from opus_jax.errors import UserError
from opus_jax.models import decoding
from opus_jax.models.flops import difference_flops, forward_flops, moving_flops
from opus_jax.models.presets import ModelSpec, resolve
from opus_jax.optim.optimizers import Optimizer
from opus_jax.training.batches import abstract_batch
from opus_jax.training.build import check_rows, optimizer_for
from opus_jax.training.overhead_budget import within_budget
from opus_jax.training.score_corpus import segment_scorer
from opus_jax.training.scoring import SCORING_METHODS, is_directed
from opus_jax.training.state import TrainState, abstract_state
from opus_jax.training.step import make_step


@dataclass(frozen=True)
class Workshop:
    """What the steps of one configuration share, built from shapes alone: nothing is read, prepared or allocated."""

    config: Config
    mesh: Mesh
    spec: ModelSpec
    optimizer: Optimizer

    @property
    def state(self) -> TrainState:
        return abstract_state(self.spec, self.optimizer, self.mesh, directed=is_directed(self.config))

    def train(self, *, chooses: bool = True) -> Lowered:
        """The training step: one that chooses its rows from a buffer, or one whose rows all come to be trained on."""
        config, tokens, state = self.config, self.config.corpus.row_tokens, self.state
        candidates = abstract_batch(config.candidates if chooses else config.batch.rows, tokens, self.mesh)
        proxy = abstract_batch(config.proxy.rows, tokens, self.mesh) if chooses and is_directed(config) else None
        step = make_step(self.spec, self.optimizer, config, self.mesh, chooses=chooses)
        useful = 3 * forward_flops(self.spec, tokens) * config.batch.rows
        every = config.proxy.refresh if proxy is not None else 1
        return Lowered(step.lower(state, candidates, proxy), self.mesh, useful, held(state), every)

    def plain(self) -> Lowered:
        return self.train(chooses=False)

    def score(self) -> Lowered:
        """`opus-jax score`: as many rows at once as a candidate buffer has."""
        config, params = self.config, self.state.params
        scorer = segment_scorer(self.spec, config, self.mesh, segments_per_row(config.corpus.row_tokens))
        rows = abstract_batch(config.candidates, config.corpus.row_tokens, self.mesh)
        with jax.set_mesh(self.mesh):
            program = scorer.lower(params, params, rows)
        return Lowered(program, self.mesh, self._scored_row * config.candidates, held(params))

    def decode(self) -> Lowered:
        """The next token of a row that is nearly full."""
        length, params, whole = self.config.corpus.row_tokens, self.state.params, replicated(self.mesh)
        row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=whole)
        place = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
        with jax.set_mesh(self.mesh):
            program = decoding.extend.lower(self.spec, decoding.Sampling(), params, row, place, key)
        return Lowered(program, self.mesh, forward_flops(self.spec, length) // length, held(params))

    @property
    def _scored_row(self) -> int:
        """FLOPs of a whole row's score, by hand count."""
        tokens, settings = self.config.corpus.row_tokens, self.config.selection
        if settings.derivative == "difference":
            return difference_flops(self.spec, tokens, settings.parameters)
        return forward_flops(self.spec, tokens) + 2 * moving_flops(self.spec, tokens, settings.parameters)


def workshop(config: Config, devices: list[Any]) -> Workshop:
    """For these devices, absent or not.

    Raises:
      UserError: the mesh or the batches do not fit the number of devices, or the model's shapes each other.
    """
    mesh = make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    spec = model_spec(config)
    config = within_budget(spec, config)
    return Workshop(config, mesh, spec, optimizer_for(spec, config))


def steps_of(config: Config) -> list[str]:
    """The steps that runs of a configuration have; one that does not choose has no other than the plain one."""
    chooses = config.selection.method in SCORING_METHODS
    absent = {"train": not chooses, "score": not is_directed(config)}
    return [step for step in STEPS if not absent.get(step)]


def held(tree: Any) -> list[tuple[str, int]]:
    """(name, bytes on one device) of the arrays of a tree of shapes with shardings."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            found.append((f"{leaf.dtype}{list(leaf.shape)} {jax.tree_util.keystr(path)}", size))
    return found


def model_spec(config: Config) -> ModelSpec:
    """The model that `train` would build on a TPU; a tokenizer still to be trained has the vocabulary asked for."""
    model = replace(config.model, dtype=config.model.dtype or "bfloat16")
    return resolve(model, _vocabulary(config), config.corpus.row_tokens)


def _vocabulary(config: Config) -> int:
    if config.tokenizer.kind == "byte":
        return byte_tokenizer().vocab_size
    if config.tokenizer.path is not None:
        return sentencepiece_tokenizer(read_model(config.tokenizer.path), config.tokenizer.path).vocab_size
    return config.tokenizer.vocab_size


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Figures of every step asked for.

    Raises:
      UserError: as `workshop`, or a step is asked for that the configuration does not have.
    """
    topology = parse_topology(request["topology"], request["slices"])
    config = from_mapping(request["config"])
    shop, has = workshop(config, absent_devices(topology)), steps_of(config)
    asked = request["steps"] or has
    if missing := [step for step in asked if step not in has]:
        raise UserError(f"--steps {','.join(missing)}: this configuration has {','.join(has)}")
    figures = {x: measure(getattr(shop, x)(), topology) for x in asked}
    every = shop.config.selection.select_every if "train" in has else 1
    return {"mesh": dict(shop.mesh.shape), "select_every": every, "steps": figures}


def main() -> None:
    """Answer one request {"config", "topology", "slices", "steps"} with {"figures": ...} or {"mistake": message}."""
    request = json.load(sys.stdin)
    answered: dict[str, Any]
    try:
        answered = {"figures": answer(request)}
    except UserError as error:
        answered = {"mistake": str(error)}
    json.dump(answered, sys.stdout)


if __name__ == "__main__":
    main()
