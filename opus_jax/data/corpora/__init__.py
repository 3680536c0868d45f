"""Corpora: where training text comes from. `load_corpus` gives the one that the configuration names."""

import dataclasses

from opus_jax.config import CorpusConfig
from opus_jax.data.corpora import debian, huggingface, local, python_env
from opus_jax.data.corpora.cap import capped
from opus_jax.data.corpora.store import reader_version
from opus_jax.data.documents import Corpus, Document, Domain, Problems, require_known
from opus_jax.data.noise import read_noise

__all__ = ["Corpus", "Document", "Domain", "Problems", "load_corpus"]

LOADERS = {
    "python-env": python_env.load,
    "debian": debian.load,
    "local": local.load,
    "hf": huggingface.load,
}


def load_corpus(config: CorpusConfig) -> Corpus:
    """The corpus of `config`, restricted to `config.domains` and capped to `config.max_bytes` per domain.

    Downloads what is missing; documents themselves are read when a domain's `documents()` is iterated.

    Raises:
      ConfigError: an unknown domain in `domains`, or a wrong entry in `noise`.
      UserError: the source is absent or unreadable.
    """
    corpus = LOADERS[config.name](config)
    corpus = dataclasses.replace(corpus, versions=corpus.versions | {"reader": reader_version()})
    if config.domains is not None:
        require_known("corpus.domains", config.domains, [d.name for d in corpus.domains])
        corpus = dataclasses.replace(corpus, domains=tuple(d for d in corpus.domains if d.name in config.domains))
    read_noise(config.noise, [d.name for d in corpus.domains])
    if config.max_bytes is not None:
        domains = tuple(capped(domain, config.max_bytes) for domain in corpus.domains)
        corpus = dataclasses.replace(corpus, domains=domains)
    return corpus
