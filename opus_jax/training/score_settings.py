"""What `opus-jax score` may be told to do otherwise than the run did, and which corpus it scores."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from opus_jax.config import Config, SelectionConfig, TokenizerConfig, changed_keys, from_mapping
from opus_jax.data.tokenizer import MODEL_FILE
from opus_jax.errors import ConfigError

_SECTIONS = ("corpus", "proxy", "batch", "mesh")
_KEYS = ("selection.direction", "selection.derivative", "selection.parameters", "selection.score_chunk")
_SOURCE = ("name", "path", "revision")  # another one of these is another corpus, with other domains
_WHERE_ONLY = ("corpus.cache_dir", "corpus.workers", "corpus.weights")  # do not change the rows


def read_settings(run_dir: Path, overrides: tuple[str, ...]) -> tuple[Config, Config | None]:
    """(the run's configuration, with another proxy, direction, batch or mesh where asked for; that of another corpus
    to score, or None where the run's own is scored).

    With another `corpus.name`, `path` or `revision`, what the run says of single domains (`domains`, `weights`,
    `noise`) does not apply, only what the overrides say of them.

    Raises:
      ConfigError: an override names a key that belongs to the checkpoint.
      UserError: the folder holds no configuration.
    """
    own, asked = Config.load(run_dir), Config.load(run_dir, overrides)
    changed = changed_keys(own, asked)
    for key in changed:
        _require_free(key, own, asked)
    corpus = replace(own.corpus, cache_dir=asked.corpus.cache_dir, workers=asked.corpus.workers)
    home = replace(asked, corpus=corpus)
    if not any(key.startswith("corpus.") and not key.startswith(_WHERE_ONLY) for key in changed):
        return home, None
    if any(getattr(own.corpus, name) != getattr(asked.corpus, name) for name in _SOURCE):
        base = own.to_mapping()
        base["corpus"] |= {"domains": None, "weights": {}, "noise": {}}
        asked = from_mapping(base, overrides)
    return home, asked


def with_tokenizer(scored: Config, home: Config, records: Path) -> Config:
    """The configuration that prepares `scored.corpus` with the tokenizer of the run's records, all of it to be read."""
    path = str(records / MODEL_FILE) if home.tokenizer.kind == "sentencepiece" else None
    return Config(
        corpus=replace(scored.corpus, weights={}),
        tokenizer=TokenizerConfig(kind=home.tokenizer.kind, path=path),
        selection=SelectionConfig(method="none"),
    )


def _require_free(key: str, own: Config, asked: Config) -> None:
    if key == "corpus.row_tokens":
        allowed = f"must be {own.corpus.row_tokens}, the length of the rows that the run was trained on"
        raise ConfigError(key, asked.corpus.row_tokens, allowed)
    if key in _KEYS or key.partition(".")[0] in _SECTIONS:
        return
    allowed = f"belongs to the checkpoint; scoring may change {', '.join(f'{s}.*' for s in _SECTIONS)}, "
    raise ConfigError(key, _value(asked, key), allowed + ", ".join(_KEYS))


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name.partition(".")[0])
