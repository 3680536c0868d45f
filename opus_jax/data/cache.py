"""Where downloaded and prepared data lie."""

import os
from pathlib import Path

from opus_jax.config import CorpusConfig


def cache_folder(config: CorpusConfig) -> Path:
    """`corpus.cache_dir`, else $OPUS_JAX_CACHE, else ~/.cache/opus_jax. The folder need not exist yet."""
    chosen = config.cache_dir or os.environ.get("OPUS_JAX_CACHE") or "~/.cache/opus_jax"
    return Path(chosen).expanduser().resolve()
