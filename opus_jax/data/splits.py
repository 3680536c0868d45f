"""Train, validation and proxy: which document belongs where, without copies between them.

The split is decided by a hash of the text, so it depends neither on the order of reading, nor on other documents, nor
on noise. Noise corrupts training documents only: runs with and without it are measured on the same text.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from opus_jax.config import CorpusConfig
from opus_jax.data.blocks import blocks
from opus_jax.data.dedup import NEAR_COPY_SHARE, NGRAM_WORDS, ExactCopies, HeldOutText
from opus_jax.data.documents import Corpus, Document
from opus_jax.data.noise import Noise, read_noise
from opus_jax.errors import UserError

Split = Literal["train", "validation", "proxy"]
Placed = tuple[Split, int, Document]  # split, domain index, document

PROXY_FILES = "proxy-files"  # the name under which the user's proxy documents are counted


@dataclass
class SplitCounts:
    """What `split_documents` kept and removed, by domain name; complete once its iterator has ended.

    Reasons of removal: `empty`, `exact_copy`, `near_copy_of_validation` (proxy documents), `near_copy_of_held_out`
    (training documents).
    """

    documents: dict[str, Counter[str]] = field(default_factory=dict)  # domain -> split -> documents kept
    bytes: dict[str, Counter[str]] = field(default_factory=dict)  # domain -> split -> their UTF-8 bytes
    removed: dict[str, Counter[str]] = field(default_factory=dict)  # domain -> reason -> documents
    corrupted: dict[str, Counter[str]] = field(default_factory=dict)  # domain -> transform -> training documents

    def keep(self, split: Split, domain: str, document: Document) -> None:
        self.documents.setdefault(domain, Counter())[split] += 1
        self.bytes.setdefault(domain, Counter())[split] += len(document.text.encode())
        if document.noise is not None:
            self.corrupted.setdefault(domain, Counter())[document.noise] += 1

    def remove(self, reason: str, domain: str) -> None:
        self.removed.setdefault(domain, Counter())[reason] += 1

    def total(self, split: Split) -> int:
        return sum(kept[split] for kept in self.documents.values())

    def to_mapping(self) -> dict:
        """Plain values for a manifest."""
        plain = {f.name: {k: dict(v) for k, v in getattr(self, f.name).items()} for f in dataclasses.fields(self)}
        return plain | {"near_copy": {"ngram_words": NGRAM_WORDS, "containment_above": NEAR_COPY_SHARE}}


def assign_split(document: Document, validation_share: float, proxy_share: float) -> Split:
    """The split of a document: a pure function of its text (up to surrounding white space) and the two shares."""
    digest = hashlib.blake2b(document.text.strip().encode(), digest_size=8, person=b"corpus-split").digest()
    place = int.from_bytes(digest, "little") / 2**64
    if place < validation_share:
        return "validation"
    return "proxy" if place < validation_share + proxy_share else "train"


def split_documents(
    corpus: Corpus, config: CorpusConfig, extra_proxy: Iterable[Document] = ()
) -> tuple[Iterator[Placed], SplitCounts]:
    """All documents that may be used, as (split, domain index, document), and counts of what was removed.

    Validation comes first, then proxy, then train; within each, domains in the corpus's order and documents in
    theirs. Removed are exact copies within the whole corpus, proxy documents more than half of whose 13-grams occur
    in validation, and training documents more than half of whose 13-grams occur in validation or proxy.

    Args:
      corpus: every domain is read twice, first for the held-out documents, which stay in memory, then for the
        training documents, which are streamed.
      extra_proxy: the user's proxy documents. When there are any, they are the proxy split, with the domain index
        `len(corpus.domains)`, and no document of the corpus is held out as proxy.

    Raises (while iterating):
      UserError: nothing is left for training or for validation.
    """
    counts = SplitCounts()
    return _place(corpus, config, list(extra_proxy), counts), counts


def _place(corpus: Corpus, config: CorpusConfig, extra: list[Document], counts: SplitCounts) -> Iterator[Placed]:
    names = [domain.name for domain in corpus.domains] + [PROXY_FILES]
    noise = read_noise(config.noise, names[:-1])
    shares = (config.validation_share, 0.0 if extra else config.proxy_share)
    copies = ExactCopies()

    read = (placed for placed in _read(corpus, shares) if placed[0] != "train")
    users: Iterator[Placed] = (("proxy", len(corpus.domains), document) for document in extra)
    held_out = list(_without_exact_copies(itertools.chain(read, users), copies, names, counts))
    validation = [placed for placed in held_out if placed[0] == "validation"]
    proxy = [placed for placed in held_out if placed[0] == "proxy"]
    proxy = list(_without_near_copies(proxy, validation, "near_copy_of_validation", names, counts))

    train: Iterator[Placed] = (placed for placed in _read(corpus, shares) if placed[0] == "train")
    train = _without_exact_copies(train, copies, names, counts)
    train = _without_near_copies(train, validation + proxy, "near_copy_of_held_out", names, counts)
    for split, index, document in itertools.chain(validation, proxy, _with_noise(train, names, noise)):
        counts.keep(split, names[index], document)
        yield split, index, document
    for split in ("train", "validation"):
        if not counts.total(split):
            raise UserError(_nothing_left(split, corpus, config))


def _read(corpus: Corpus, shares: tuple[float, float]) -> Iterator[Placed]:
    for index, domain in enumerate(corpus.domains):
        for document in domain.documents():
            yield assign_split(document, *shares), index, document


def _without_exact_copies(
    documents: Iterable[Placed], copies: ExactCopies, names: list[str], counts: SplitCounts
) -> Iterator[Placed]:
    for placed in documents:
        _, index, document = placed
        if not document.text.strip():
            counts.remove("empty", names[index])
        elif not copies.is_new(document.text):
            counts.remove("exact_copy", names[index])
        else:
            yield placed


def _without_near_copies(
    documents: Iterable[Placed], held_out: list[Placed], reason: str, names: list[str], counts: SplitCounts
) -> Iterator[Placed]:
    held_out_text = HeldOutText(document.text for _, _, document in held_out)
    for block in blocks(documents, lambda placed: len(placed[2].text)):
        near = held_out_text.containment([document.text for _, _, document in block]) > NEAR_COPY_SHARE
        for placed, is_near in zip(block, near, strict=True):
            if is_near:
                counts.remove(reason, names[placed[1]])
            else:
                yield placed


def _with_noise(documents: Iterable[Placed], names: list[str], noise: dict[str, Noise]) -> Iterator[Placed]:
    for split, index, document in documents:
        name = names[index]
        yield split, index, noise[name](document, name) if name in noise else document


def _nothing_left(split: str, corpus: Corpus, config: CorpusConfig) -> str:
    share = f"corpus.validation_share = {config.validation_share}"
    return (
        f"corpus {corpus.name}: no document is left for {split} ({share}, corpus.proxy_share = {config.proxy_share}): "
        "give more documents (large files may be split into smaller ones) or change the shares"
    )
