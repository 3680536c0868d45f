"""Lower the real training step for the devices of a TPU slice that is not there.

`python -m opus_jax.training.lower_step` is the child process of `opus-jax compile`: it reads a request from standard
input and writes the figures to standard output, each as one JSON object.
"""

import json
import sys
from typing import Any

from opus_jax.config import Config, from_mapping, replace
from opus_jax.data.tokenizer import byte_tokenizer, sentencepiece_tokenizer
from opus_jax.data.tokenizer_training import read_model
from opus_jax.distributed.compile import measure
from opus_jax.distributed.mesh import make_mesh
from opus_jax.distributed.topology import absent_devices, parse_topology
from opus_jax.errors import UserError
from opus_jax.models.presets import ModelSpec, resolve
from opus_jax.training.batches import abstract_batch
from opus_jax.training.build import check_rows, optimizer_for
from opus_jax.training.overhead_budget import within_budget
from opus_jax.training.scoring import is_directed
from opus_jax.training.state import abstract_state
from opus_jax.training.step import make_step


def lower_step(config: Config, devices: list[Any]) -> Any:
    """Lower `make_step`'s step for these devices, from shapes alone: nothing is read, prepared or allocated.

    Raises:
      UserError: the mesh or the batches do not fit the number of devices, or the model's shapes each other.
    """
    mesh = make_mesh(config.mesh, devices)
    check_rows(config, mesh)
    spec = model_spec(config)
    config = within_budget(spec, config)
    optimizer = optimizer_for(spec, config)
    directed = is_directed(config)
    tokens = config.corpus.row_tokens
    candidates = abstract_batch(config.candidates, tokens, mesh)
    proxy = abstract_batch(config.proxy.rows, tokens, mesh) if directed else None
    step = make_step(spec, optimizer, config, mesh)
    return step.lower(abstract_state(spec, optimizer, mesh, directed=directed), candidates, proxy)


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


def main() -> None:
    """Answer one request {"config": mapping, "topology": name} with {"figures": ...} or {"mistake": message}."""
    request = json.load(sys.stdin)
    topology = parse_topology(request["topology"])
    answer: dict[str, Any]
    try:
        answer = {"figures": measure(lower_step(from_mapping(request["config"]), absent_devices(topology)), topology)}
    except UserError as error:
        answer = {"mistake": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
