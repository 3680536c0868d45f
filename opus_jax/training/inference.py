"""Using a trained run: its model for evaluation and for writing text."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from opus_jax.config import Config
from opus_jax.distributed.agreement import same_fate
from opus_jax.distributed.axes import place, tree_shardings
from opus_jax.models import decoding, transformer
from opus_jax.training.build import Parts, build
from opus_jax.training.checkpoint import load_params


def evaluate_run(run_dir: Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Bits per byte of the newest checkpoint, by domain and over the target domains.

    Raises:
      UserError: the folder holds no configuration or no readable checkpoint.
    """
    parts, params, step = _load(run_dir, overrides)
    bits, target = parts.evaluate_target(params)
    return {"run": str(run_dir), "step": step, "bits_per_byte": bits, "target_bits_per_byte": target}


def generate_text(
    run_dir: Path, prompt: str, tokens: int, sampling: decoding.Sampling, seed: int, overrides: tuple[str, ...] = ()
) -> Iterator[str]:
    """Text that goes on from a prompt, piece by piece; the prompt comes first.

    Raises:
      UserError: the folder holds no configuration or no readable checkpoint, or prompt and new tokens are too long.
    """
    parts, params, _ = _load(run_dir, overrides)
    tokenizer = parts.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    yield prompt
    stream = decoding.generate_tokens(
        parts.spec, params, ids, max_new_tokens=tokens, sampling=replace(sampling, vocabulary=tokenizer.vocab_size),
        key=jax.random.key(seed), eos_id=tokenizer.eos_id,
    )  # fmt: skip
    written, shown = [], ""
    for token in stream:
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # a character whose last bytes are still to come
            yield text[len(shown) :]
            shown = text


def _load(run_dir: Path, overrides: tuple[str, ...]) -> tuple[Parts, Any, int]:
    with same_fate():
        config = Config.load(run_dir, overrides)
        loaded, step, _ = load_params(run_dir)
        parts = build(config, progress=jax.process_index() == 0)
    shardings = tree_shardings(parts.mesh, transformer.logical_axes(parts.spec), loaded)
    return parts, jax.tree.map(place, loaded, shardings), step
