"""Keep a representative part of a domain: the documents whose hashes are smallest, up to a number of bytes."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

from opus_jax.data.documents import Document, Domain
from opus_jax.errors import ConfigError


def capped(domain: Domain, max_bytes: int) -> Domain:
    """`domain` with at most `max_bytes` UTF-8 bytes, in its own order.

    Documents are admitted in the order of a hash of their text, so the part kept is spread over the whole domain
    and, as long as no document exceeds the cap, a larger cap keeps everything that a smaller one keeps.
    """

    @functools.cache
    def admitted() -> frozenset[bytes]:
        sizes = {_key(d): len(d.text.encode()) for d in domain.documents()}
        return _admit(sizes, max_bytes, domain.name)

    def documents() -> Iterator[Document]:
        keep = set(admitted())
        for document in domain.documents():
            if _key(document) in keep:
                keep.discard(_key(document))  # a second copy of the same text would exceed the cap
                yield document

    return dataclasses.replace(domain, documents=documents)


def _key(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode(), digest_size=8, person=b"corpus-cap").digest()


def _admit(sizes: dict[bytes, int], max_bytes: int, name: str) -> frozenset[bytes]:
    chosen, total = set(), 0
    for key in sorted(sizes):
        if total + sizes[key] <= max_bytes:
            chosen.add(key)
            total += sizes[key]
    if sizes and not chosen:
        smallest = min(sizes.values())
        raise ConfigError(
            "corpus.max_bytes", max_bytes, f"must be at least {smallest}, the smallest document of {name}"
        )
    return frozenset(chosen)
