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
from opus_jax.data.dedup import NEAR_COPY_SHARE, NGRAM_WORDS, ExactCopies, HeldOutText, text_key
from opus_jax.data.documents import Corpus, Document
from opus_jax.data.noise import Noise, read_noise
from opus_jax.data.retrieval import Retrieval
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
    corpus: Corpus, config: CorpusConfig, extra_proxy: Iterable[Document] = (), retrieval: Retrieval | None = None
) -> tuple[Iterator[Placed], SplitCounts]:
    """All documents that may be used, as (split, domain index, document), and counts of what was removed.

    Validation comes first, then proxy, then train; within each, domains in the corpus's order and documents in
    theirs. Removed are exact copies within the whole corpus, proxy documents more than half of whose 13-grams occur
    in validation, and training documents more than half of whose 13-grams occur in validation or proxy.

    Args:
      corpus: every domain is read twice, first for the held-out documents, which stay in memory, then for the
        training documents, which are streamed; and twice more in between for a retrieval.
      extra_proxy: the user's proxy documents. When there are any, they are the proxy split, with the domain index
        `len(corpus.domains)`, and no document of the corpus is held out as proxy.
      retrieval: when given, the documents of the corpus that are most like its texts are the proxy split, instead of
        those that a hash holds out. Its texts are treated as held out (they and their near copies are in no split
        but validation), and those that are near copies of validation text are not used.

    Raises (while iterating):
      UserError: nothing is left for training or for validation, or of the user's documents.
    """
    counts = SplitCounts()
    return _place(corpus, config, list(extra_proxy), retrieval, counts), counts


def _place(
    corpus: Corpus, config: CorpusConfig, extra: list[Document], retrieval: Retrieval | None, counts: SplitCounts
) -> Iterator[Placed]:
    names = [domain.name for domain in corpus.domains] + [PROXY_FILES]
    noise = read_noise(config.noise, names[:-1])
    given = retrieval.texts if retrieval else extra
    shares = (config.validation_share, 0.0 if given else config.proxy_share)
    copies = ExactCopies()

    read = (placed for placed in _read(corpus, shares) if placed[0] != "train")
    users: Iterator[Placed] = (("proxy", len(corpus.domains), document) for document in given)
    held_out = list(_without_exact_copies(itertools.chain(read, users), copies, names, counts))
    validation = [placed for placed in held_out if placed[0] == "validation"]
    proxy = [placed for placed in held_out if placed[0] == "proxy"]
    proxy = list(_without_near_copies(proxy, validation, "near_copy_of_validation", names, counts))
    if given and not proxy:
        raise UserError(_nothing_given(len(given), counts))
    held_out, retrieved = validation + proxy, set[bytes]()
    if retrieval:
        retrieved = _retrieve(corpus, shares, validation, proxy, retrieval, names)
        proxy = list(_of_keys(corpus, shares, retrieved))
        held_out += proxy

    train: Iterator[Placed] = (placed for placed in _read(corpus, shares) if placed[0] == "train")
    train = _without_exact_copies(train, copies, names, counts)
    if retrieved:
        train = (placed for placed in train if text_key(placed[2].text) not in retrieved)
    train = _without_near_copies(train, held_out, "near_copy_of_held_out", names, counts)
    yield from _counted(itertools.chain(validation, proxy, _with_noise(train, names, noise)), names, counts)
    for split in ("train", "validation"):
        if not counts.total(split):
            raise UserError(_nothing_left(split, corpus, config))


def _retrieve(
    corpus: Corpus,
    shares: tuple[float, float],
    validation: list[Placed],
    queries: list[Placed],
    retrieval: Retrieval,
    names: list[str],
) -> set[bytes]:
    """Keys of the documents that are most like `queries` and copies neither of these nor of validation text."""
    read, unused = SplitCounts(), SplitCounts()
    wanted = retrieval.domains or names
    documents: Iterator[Placed] = (
        placed
        for placed in _counted(_read(corpus, shares), names, read)
        if placed[0] == "train" and names[placed[1]] in wanted
    )
    documents = _without_exact_copies(documents, ExactCopies(), names, unused)
    documents = _without_near_copies(documents, validation + queries, "", names, unused)
    searched = retrieval.search((d.text for _, _, d in documents), [d.text for _, _, d in queries])
    return retrieval.choose(searched, sum(sum(of_split.values()) for of_split in read.bytes.values()))


def _of_keys(corpus: Corpus, shares: tuple[float, float], keys: set[bytes]) -> Iterator[Placed]:
    """The first document of each key, as proxy."""
    left = set(keys)
    for split, index, document in _read(corpus, shares):
        key = text_key(document.text)
        if split == "train" and key in left:
            left.remove(key)
            yield "proxy", index, document


def _counted(documents: Iterable[Placed], names: list[str], counts: SplitCounts) -> Iterator[Placed]:
    for split, index, document in documents:
        counts.keep(split, names[index], document)
        yield split, index, document


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


def _nothing_given(count: int, counts: SplitCounts) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.removed[PROXY_FILES].items()))
    return (
        f"proxy.path: none of its {count} texts is left after de-duplication ({reasons}): give text that is neither "
        "in the corpus's validation split nor empty"
    )


def _nothing_left(split: str, corpus: Corpus, config: CorpusConfig) -> str:
    share = f"corpus.validation_share = {config.validation_share}"
    return (
        f"corpus {corpus.name}: no document is left for {split} ({share}, corpus.proxy_share = {config.proxy_share}): "
        "give more documents (large files may be split into smaller ones) or change the shares"
    )
