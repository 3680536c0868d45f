"""`model.init_from`: a run that begins with another run's weights."""

from pathlib import Path
from typing import Any

import jax

from opus_jax.errors import ConfigError
from opus_jax.training.build import Parts
from opus_jax.training.checkpoint import load_params


def first_weights(parts: Parts) -> Any:
    """The weights of `model.init_from`.

    Raises:
      UserError: there are none, or they are of another model or another tokenizer.
    """
    source = str(parts.config.model.init_from)
    params, _, meta = load_params(Path(source))
    mine, theirs = _shapes_by_name(parts.abstract_state().params), _shapes_by_name(params)
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = mine.get(name, "absent"), theirs.get(name, "absent")
        if here != there:
            allowed = (
                f"its model is another one ({name} is {there} there and {here} here): set model.* as in its config"
            )
            raise ConfigError("model.init_from", source, allowed)
    if meta["tokenizer"] != parts.manifest.tokenizer_hash:
        raise ConfigError(
            "model.init_from", source, "was trained with another tokenizer: set tokenizer.path to that one"
        )
    return params


def _shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
