"""A corpus of made-up text, and its records folder, for tests of preparation and of the candidate stream."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import opus_jax.data.prepare as preparation
from opus_jax.config import Config, CorpusConfig, from_mapping
from opus_jax.data import build_records
from opus_jax.data.documents import Corpus, Document, Domain
from opus_jax.data.record_writer import write_split

WORDS = [a + b for a in ("ba", "do", "ki", "lum", "re", "so") for b in ("t", "nek", "ris", "va", "\n", "é", "  ")]


def documents(name: str, count: int, longest: int = 300) -> Iterator[Document]:
    dice = random.Random(name)
    for i in range(count):
        words = dice.choices(WORDS, k=dice.randint(1, longest))
        yield Document(f"{name} {i} " + " ".join(words), f"{name}/{i}")


def corpus(config: CorpusConfig | None = None) -> Corpus:
    sizes = {"prose": 60, "code": 90, "tables": 30}
    domains = (Domain(n, f"licence of {n}", lambda n=n, k=k: documents(n, k)) for n, k in sizes.items())
    return Corpus("small", tuple(domains), {"small": "1"})


def small_config(cache: Path, **sections: dict) -> Config:
    mapping = {
        "corpus": {
            "cache_dir": str(cache),
            "workers": 1,
            "row_tokens": 64,
            "validation_share": 0.2,
            "proxy_share": 0.2,
        },
        "tokenizer": {"vocab_size": 320},
    }
    for section, values in sections.items():
        mapping.setdefault(section, {}).update(values)
    return from_mapping(mapping)


def prepare_small(cache: Path, **sections: dict) -> Path:
    """As `prepare`, reading `corpus` instead of the one the configuration names, into many small shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "load_corpus", corpus)
        patch.setattr(build_records, "write_split", partial(write_split, shard_bytes=60_000))
        return preparation.prepare(small_config(cache, **sections), progress=False)
