"""Splits are disjoint, do not move, and share no text."""

import random

import pytest

from opus_jax.config import CorpusConfig
from opus_jax.data.dedup import NEAR_COPY_SHARE, HeldOutText
from opus_jax.data.documents import Corpus, Document, Domain
from opus_jax.data.splits import PROXY_FILES, assign_split, split_documents
from opus_jax.errors import ConfigError, UserError

CONFIG = CorpusConfig(validation_share=0.1, proxy_share=0.2)
VOCABULARY = [f"w{i}" for i in range(500)]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def corpus(**domains: list[str]) -> Corpus:
    def domain(name: str, texts: list[str]) -> Domain:
        return Domain(name, "none", lambda: (Document(t, f"{name}/{i}") for i, t in enumerate(texts)))

    return Corpus("test", tuple(domain(name, texts) for name, texts in domains.items()), {})


def split(texts: Corpus, config: CorpusConfig = CONFIG, extra=()):
    placed, counts = split_documents(texts, config, extra)
    return list(placed), counts.to_mapping()


def texts_of(placed, name: str) -> list[str]:
    return [document.text for split_name, _, document in placed if split_name == name]


def in_split(name: str, count: int, start: int = 0) -> list[str]:
    """Texts whose hash puts them in a split."""
    seeds = (s for s in range(start, 10**9) if assign_split(Document(text(s), ""), 0.1, 0.2) == name)
    return [text(next(seeds)) for _ in range(count)]


def test_shares_are_met_and_splits_are_disjoint_and_complete():
    pool = [text(i) for i in range(2000)]
    placed, counts = split(corpus(a=pool[:1200], b=pool[1200:]))
    parts = {name: set(texts_of(placed, name)) for name in ("train", "validation", "proxy")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 2000
    assert abs(len(parts["validation"]) / 2000 - 0.1) < 0.03
    assert abs(len(parts["proxy"]) / 2000 - 0.2) < 0.04
    assert counts["documents"]["a"]["train"] + counts["documents"]["b"]["train"] == len(parts["train"])
    assert counts["bytes"]["b"]["proxy"] == sum(len(d.text) for s, i, d in placed if s == "proxy" and i == 1)
    assert counts["removed"] == {}


def test_the_split_of_a_document_depends_on_its_text_alone():
    document = Document("some text", "here")
    assert assign_split(document, 0.1, 0.2) == assign_split(Document(" some text\n", "elsewhere"), 0.1, 0.2)
    for seed in range(300):
        narrow, wide = (assign_split(Document(text(seed), ""), share, 0.2) for share in (0.1, 0.2))
        assert narrow != "validation" or wide == "validation"


def test_order_is_split_then_domain_then_document():
    pool = [text(i) for i in range(300)]
    placed, _ = split(corpus(a=pool[:150], b=pool[150:]))
    order = {"validation": 0, "proxy": 1, "train": 2}
    keys = [(order[s], i, int(d.source.split("/")[1])) for s, i, d in placed]
    assert keys == sorted(keys)
    assert placed == split(corpus(a=pool[:150], b=pool[150:]))[0]


def test_exact_copies_go_wherever_they_are():
    pool = [text(i) for i in range(100)]
    placed, counts = split(corpus(a=pool, b=[*pool[:30], *pool[:10], text(1000)]))
    assert len(placed) == 101
    assert counts["removed"] == {"b": {"exact_copy": 40}}


def test_near_copies_of_held_out_text_leave_training():
    validation, proxy, train = (in_split(name, 5) for name in ("validation", "proxy", "train"))
    near = [t.upper() + "!" for t in in_split("validation", 60) + in_split("proxy", 60)]
    near = [t for t in near if assign_split(Document(t, ""), 0.1, 0.2) == "train"]
    copied_from = [t.lower().rstrip("!") for t in near]
    placed, counts = split(corpus(a=[*train, *near, *copied_from, *validation, *proxy]))
    assert set(texts_of(placed, "train")) == set(train)
    assert counts["removed"]["a"]["near_copy_of_held_out"] == len(near) > 10
    held_out = HeldOutText(texts_of(placed, "validation") + texts_of(placed, "proxy"))
    assert held_out.containment(texts_of(placed, "train")).max() <= NEAR_COPY_SHARE


def test_near_copies_of_validation_leave_the_proxy():
    validation = in_split("validation", 60)
    near = [t.upper() for t in validation if assign_split(Document(t.upper(), ""), 0.1, 0.2) == "proxy"]
    other = in_split("proxy", 3)
    placed, counts = split(corpus(a=[*validation, *near, *other, *in_split("train", 3)]))
    assert texts_of(placed, "proxy") == other
    assert counts["removed"]["a"] == {"near_copy_of_validation": len(near)}
    assert near


def test_a_document_half_of_which_is_new_stays():
    held_out, fresh = in_split("validation", 1)[0], text(10**6, 400)
    placed, _ = split(corpus(a=[held_out, f"{held_out} {fresh}", *in_split("train", 3)]))
    assert sum(fresh in t for t in texts_of(placed, "train") + texts_of(placed, "proxy")) == 1


def test_user_files_are_the_proxy_and_their_copies_leave_training():
    train = in_split("train", 20)
    would_be_proxy = in_split("proxy", 10)
    mine = [Document(train[0].upper(), "mine/0"), Document(text(10**7), "mine/1")]
    placed, counts = split(corpus(a=[*train, *would_be_proxy, *in_split("validation", 3)]), extra=mine)
    assert [(i, d) for s, i, d in placed if s == "proxy"] == [(1, d) for d in mine]
    assert set(texts_of(placed, "train")) == {*train[1:], *would_be_proxy}
    assert counts["removed"]["a"] == {"near_copy_of_held_out": 1}
    assert counts["documents"][PROXY_FILES] == {"proxy": 2}


def test_noise_corrupts_training_documents_only_and_moves_none():
    pool = [text(i) for i in range(400)]
    noisy = CorpusConfig(validation_share=0.1, proxy_share=0.2, noise={"a": "boilerplate:0.5"})
    clean_placed, _ = split(corpus(a=pool, b=in_split("train", 5, 10**4)))
    placed, counts = split(corpus(a=pool, b=in_split("train", 5, 10**4)), noisy)
    assert [(s, d.source) for s, _, d in placed] == [(s, d.source) for s, _, d in clean_placed]
    touched = [(s, i) for s, i, d in placed if d.noise == "boilerplate"]
    assert set(touched) == {("train", 0)}
    assert abs(len(touched) / counts["documents"]["a"]["train"] - 0.5) < 0.1
    assert counts["corrupted"] == {"a": {"boilerplate": len(touched)}}


def test_empty_documents_are_counted():
    _, counts = split(corpus(a=[*(text(i) for i in range(60)), " \n", ""]))
    assert counts["removed"] == {"a": {"empty": 2}}


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_an_empty_split_is_an_error(missing):
    present = {"train", "validation"} - {missing}
    with pytest.raises(UserError, match=f"no document is left for {missing}"):
        split(corpus(a=in_split(present.pop(), 3)))


def test_noise_for_an_unknown_domain_is_an_error():
    with pytest.raises(ConfigError, match=r"corpus\.noise\.c"):
        split(corpus(a=[text(1)]), CorpusConfig(noise={"c": "shuffle:1"}))
