"""A dataset of the Hugging Face hub, streamed once at a pinned revision into the cache (extra `hf`)."""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from opus_jax.config import CorpusConfig, fingerprint
from opus_jax.data.cache import cache_folder
from opus_jax.data.corpora import store
from opus_jax.data.corpora.records_file import check_text
from opus_jax.data.documents import Corpus, Document, Domain, Problems
from opus_jax.errors import ConfigError, MissingExtraError, UserError


def load(config: CorpusConfig) -> Corpus:
    """The dataset `config.path`, written `name` or `name:subset`; its split `train`.

    With `max_bytes` the stream is read until every domain of `config.domains` (or the only domain, where
    `domain_by` is not `field`) has that much, so a small sample of a large dataset stays a small download.

    Raises:
      ConfigError: the revision is not a commit hash, so it would not pin anything.
      MissingExtraError: the package `datasets` is not installed.
      UserError: the hub cannot be reached or refuses, or a record has no text and `strict` is set.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        raise ConfigError("corpus.revision", config.revision, "must be a commit hash of 40 hexadecimal digits")
    keys = ("path", "revision", "text_field", "domain_by", "domain_field", "domains", "max_bytes", "strict")
    mark = fingerprint({key: getattr(config, key) for key in keys}, store.reader_version())
    folder = cache_folder(config) / "hf" / mark
    if not store.is_partitioned(folder):
        problems = Problems()
        store.partition(_enough(_records(_stream(config), config, problems), config), folder, problems)
    parts, problems = store.partitioned(folder)
    licence = f"see the card of the dataset {str(config.path).partition(':')[0]}"
    domains = tuple(Domain(name, licence, functools.partial(store.read, part)) for name, part in parts.items())
    return Corpus("hf", domains, {str(config.path): str(config.revision)}, problems)


def _stream(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("corpus.name = hf", "datasets", "hf") from None
    name, _, subset = str(config.path).partition(":")
    try:
        stream = datasets.load_dataset(name, subset or None, split="train", revision=config.revision, streaming=True)
        yield from stream
    except (OSError, ValueError, RuntimeError) as error:  # what the hub's clients raise: network, name, permission
        raise UserError(f"dataset {config.path} at {config.revision}: {' '.join(str(error).split())[:300]}") from None


def _records(
    stream: Iterable[dict[str, Any]], config: CorpusConfig, problems: Problems
) -> Iterator[tuple[str, Document]]:
    by_field = config.domain_by == "field"
    single = str(config.path).partition(":")[0].rsplit("/", 1)[-1]
    for row, record in enumerate(stream):
        text = record.get(config.text_field)
        domain = str(record.get(config.domain_field) or "") if by_field else single
        wrong = check_text(text, config.text_field) or (None if domain else f"no field {config.domain_field!r}")
        if wrong and config.strict:
            raise UserError(f"dataset {config.path}, row {row}: {wrong}; set corpus.strict=false to count such rows")
        if wrong:
            problems.add(str(config.path), wrong, row)
        else:
            yield domain, Document(str(text), f"{config.path}:{record.get('id', row)}")


def _enough(pairs: Iterable[tuple[str, Document]], config: CorpusConfig) -> Iterator[tuple[str, Document]]:
    """Leaves out unwanted domains and what exceeds `max_bytes`; ends once every domain that is known is full."""
    known = set(config.domains or ())
    limit = config.max_bytes
    used: Counter[str] = Counter()
    full: set[str] = set()
    for domain, document in pairs:
        size = len(document.text.encode())
        if known and domain not in known:
            continue
        if limit is not None and used[domain] + size > limit:
            if used[domain]:  # else a single document exceeds the limit
                full.add(domain)
            if full and (config.domain_by != "field" or full == known):
                return
            continue
        used[domain] += size
        yield domain, document
