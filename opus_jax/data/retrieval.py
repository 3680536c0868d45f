"""A proxy from the corpus itself: the documents most like texts that the user gives (BENCH-PROXY, arXiv 2602.05400).

A document's similarity is its largest cosine with any of the user's texts, both seen from the mean of the documents
searched, over the beginning of every text. The most similar documents become the proxy. The user's texts do not.

Texts that a benchmark's questions or answers are taken from must not be given: what is measured with them afterwards
would have been steered by them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from opus_jax.data.blocks import blocks
from opus_jax.data.dedup import text_key
from opus_jax.data.documents import Document
from opus_jax.data.embedding import EMBEDDED_CHARACTERS, Embedder, centred
from opus_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Searched:
    """All documents that may be retrieved, one place each."""

    similarity: Float32[np.ndarray, " documents"]
    bytes: Int64[np.ndarray, " documents"]
    keys: list[bytes]  # `text_key`


@dataclass
class Retrieval:
    """What to look for, and, once it is found, what that was.

    Attributes:
      texts: the user's.
      share: of the corpus's bytes that the retrieved documents shall hold.
      domains: those searched; empty = all.
      facts: counts and the range of similarities; complete once `choose` has returned.
    """

    texts: list[Document]
    embedder: Embedder
    share: float
    domains: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def search(self, documents: Iterable[str], queries: Sequence[str]) -> Searched:
        """The similarity of every document to the nearest of the user's texts that are left after de-duplication."""
        made, sizes, keys = [], [], []
        for block in blocks(documents, lambda text: min(len(text), EMBEDDED_CHARACTERS)):
            made.append(self.embedder(block))
            sizes += [len(text.encode()) for text in block]
            keys += [text_key(text) for text in block]
        self.facts |= {"texts": len(self.texts), "texts_used": len(queries), "documents_searched": len(keys)}
        similarity = _similarity(np.concatenate(made), self.embedder(queries)) if made else np.zeros(0, np.float32)
        return Searched(similarity, np.array(sizes, np.int64), keys)

    def choose(self, searched: Searched, corpus_bytes: int) -> set[bytes]:
        """Keys of the most similar documents that together reach `share` of `corpus_bytes`, or of all there are.

        Raises:
          UserError: there are none.
        """
        if not searched.keys:
            where = f"proxy.domains = {self.domains}" if self.domains else "the corpus"
            raise UserError(
                f"proxy.source = retrieved: {where} has no document beside validation text and copies of the texts of "
                "proxy.path: name other domains, or give more documents"
            )
        ranked = np.argsort(-searched.similarity, kind="stable")
        before = np.cumsum(searched.bytes[ranked]) - searched.bytes[ranked]
        chosen = ranked[before < self.share * corpus_bytes]
        similarity = searched.similarity[chosen]
        self.facts |= {
            "documents": len(chosen),
            "bytes": int(searched.bytes[chosen].sum()),
            "highest_similarity": round(float(similarity.max()), 6),
            "lowest_similarity": round(float(similarity.min()), 6),
        }
        return {searched.keys[i] for i in chosen}


def _similarity(
    documents: Float32[np.ndarray, "n D"], queries: Float32[np.ndarray, "q D"]
) -> Float32[np.ndarray, " n"]:
    mean = documents.mean(0)
    return (centred(documents, mean) @ centred(queries, mean).T).max(1)
