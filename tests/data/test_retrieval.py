"""A proxy retrieved from the corpus: what is like the user's texts, and nothing that must stay out of it."""

import random

import numpy as np
import pytest
from small_corpus import corpus as small_corpus
from small_corpus import prepare_small

from opus_jax.config import CorpusConfig
from opus_jax.data.documents import Corpus, Document, Domain
from opus_jax.data.documents_table import iterate_texts, read_columns
from opus_jax.data.embedding import hashing_embedder
from opus_jax.data.records import Manifest, RowReader
from opus_jax.data.retrieval import Retrieval, Searched
from opus_jax.data.splits import PROXY_FILES, assign_split, split_documents
from opus_jax.errors import ConfigError, UserError

CONFIG = CorpusConfig(validation_share=0.2, proxy_share=0.2)
TOPICS = {
    "sea": ["wave", "harbour", "sailor", "anchor", "salt", "gull", "tide"],
    "law": ["statute", "court", "plaintiff", "verdict", "appeal", "bench", "oath"],
}


def text(topic: str, seed: int, words: int = 60) -> str:
    return " ".join(random.Random(f"{topic}{seed}").choices([*TOPICS[topic], "the", "and", "of"], k=words))


def corpus(**domains: list[str]) -> Corpus:
    def domain(name: str, texts: list[str]) -> Domain:
        return Domain(name, "none", lambda: (Document(t, f"{name}/{i}") for i, t in enumerate(texts)))

    return Corpus("test", tuple(domain(name, texts) for name, texts in domains.items()), {})


def retrieval(texts: list[str], share: float = 0.1, domains: tuple[str, ...] = ()) -> Retrieval:
    return Retrieval([Document(t, f"mine/{i}") for i, t in enumerate(texts)], hashing_embedder(), share, list(domains))


def split(texts: Corpus, wanted: Retrieval):
    placed, counts = split_documents(texts, CONFIG, (), wanted)
    by_split: dict[str, list[str]] = {"train": [], "validation": [], "proxy": []}
    for name, _, document in placed:
        by_split[name].append(document.text)
    return by_split, counts.to_mapping()


@pytest.fixture(scope="module")
def pool():
    """Two domains that both hold both topics: a domain's name says nothing."""
    mixed = [text(topic, i) for i in range(100) for topic in TOPICS]
    return {"a": mixed[:100], "b": mixed[100:]}


def test_the_documents_most_like_the_texts_become_the_proxy(pool):
    wanted = retrieval([text("sea", 1000), text("sea", 1001)])
    parts, counts = split(corpus(**pool), wanted)
    seas = {text("sea", i) for i in range(100)}
    assert set(parts["proxy"]) <= seas
    size = sum(len(t) for texts in pool.values() for t in texts)
    held = sum(len(t) for t in parts["proxy"])
    assert 0.1 * size <= held < 0.1 * size + 600
    everything = [t for texts in parts.values() for t in texts]
    assert sorted(everything) == sorted(pool["a"] + pool["b"]), "nothing is lost, nothing is there twice"
    assert counts["removed"] == {}
    assert wanted.facts["documents"] == len(parts["proxy"])
    assert wanted.facts["bytes"] == held
    assert wanted.facts["documents_searched"] == len(everything) - len(parts["validation"])
    assert 1 > wanted.facts["highest_similarity"] > wanted.facts["lowest_similarity"] > 0


def test_without_retrieval_the_validation_split_is_the_same(pool):
    parts, _ = split(corpus(**pool), retrieval([text("law", 1000)]))
    plain, _ = split_documents(corpus(**pool), CONFIG)
    assert parts["validation"] == [d.text for name, _, d in plain if name == "validation"]


def test_one_like_text_is_enough(pool):
    """The largest cosine counts, not the mean: a second, unlike text takes nothing away."""
    parts, _ = split(corpus(**pool), retrieval([text("sea", 1000), text("law", 1000)]))
    topics = {topic: sum(t in {text(topic, i) for i in range(100)} for t in parts["proxy"]) for topic in TOPICS}
    assert min(topics.values()) >= 3


def test_only_the_named_domains_are_searched(pool):
    wanted = retrieval([text("sea", 1000)], domains=("b",))
    placed, _ = split_documents(corpus(**pool), CONFIG, (), wanted)
    assert {index for name, index, _ in placed if name == "proxy"} == {1}
    assert wanted.facts["documents_searched"] < 100


def test_near_copies_of_retrieved_documents_leave_training(pool):
    first, _ = split(corpus(**pool), retrieval([text("sea", 1000)], share=0.02))
    copies = [t.upper() for t in first["proxy"]]
    copies = [t for t in copies if assign_split(Document(t, ""), 0.2, 0.0) == "train"]
    added = {**pool, "c": copies + [text("law", 500 + i) for i in range(20)]}
    parts, counts = split(corpus(**added), retrieval([text("sea", 1000)], share=0.02, domains=("a", "b")))
    assert set(first["proxy"]) <= set(parts["proxy"])
    assert copies
    assert not set(copies) & set(parts["train"])
    assert counts["removed"]["c"]["near_copy_of_held_out"] == len(copies)


def test_validation_text_never_becomes_proxy(pool):
    plain, _ = split(corpus(**pool), retrieval([text("sea", 1000)]))
    near = [t.upper() + " !" for t in plain["validation"]]
    parts, _ = split(corpus(**pool, c=near), retrieval([text("sea", 1000)], share=0.3))
    assert not set(parts["proxy"]) & {*near, *plain["validation"]}
    assert not set(parts["train"]) & set(near)


def test_the_users_texts_become_rows_of_no_kind(pool):
    mine = [text("sea", 1000), text("sea", 1001)]
    near = [mine[0].upper(), mine[1] + " tail", mine[0]]
    near = [t for t in near if assign_split(Document(t, ""), 0.2, 0.0) == "train"]
    assert len(near) >= 2
    parts, counts = split(corpus(**pool, c=near), retrieval(mine))
    assert not {*near, *mine} & {t for name in ("train", "proxy") for t in parts[name]}
    assert sum(counts["removed"]["c"].values()) == len(near)
    assert PROXY_FILES not in counts["documents"]


def test_texts_that_are_all_copies_of_validation_are_refused(pool):
    plain, _ = split(corpus(**pool), retrieval([text("sea", 1000)]))
    copies = [plain["validation"][0], plain["validation"][1].upper(), " "]
    with pytest.raises(UserError, match=r"none of its 3 texts is left .*1 empty, 1 exact_copy, 1 near_copy"):
        split(corpus(**pool), retrieval(copies))
    wanted = retrieval([*copies, text("sea", 1000)])
    split(corpus(**pool), wanted)
    assert (wanted.facts["texts"], wanted.facts["texts_used"]) == (4, 1)


def test_proxy_files_that_are_all_copies_of_validation_are_refused_too(pool):
    plain, _ = split(corpus(**pool), retrieval([text("sea", 1000)]))
    placed, _ = split_documents(corpus(**pool), CONFIG, [Document(plain["validation"][0], "mine")])
    with pytest.raises(UserError, match=r"proxy.path: none of its 1 texts is left"):
        list(placed)


def test_a_search_that_finds_nothing_is_refused(pool):
    with pytest.raises(UserError, match=r"retrieved: proxy.domains = \['c'\] has no document"):
        split(corpus(**pool, c=[" "]), retrieval([text("sea", 1000)], domains=("c",)))


def test_documents_are_taken_by_similarity_until_the_share_is_reached():
    similarity = np.array([0.1, 0.9, 0.5, 0.9, -0.2], np.float32)
    searched = Searched(similarity, np.array([10, 10, 10, 10, 10]), [bytes([i]) for i in range(5)])
    for share, expected in ((0.001, {1}), (0.1, {1}), (0.11, {1, 3}), (0.3, {1, 2, 3}), (0.9, {0, 1, 2, 3, 4})):
        assert retrieval(["x"], share).choose(searched, 100) == {bytes([i]) for i in expected}


def write_texts(tmp_path, domain: str):
    """Some training documents of a domain, cut and mixed, as a user might write of the same things."""
    folder = tmp_path / "mine"
    folder.mkdir()
    documents = [d.text.split() for d in next(d for d in small_corpus().domains if d.name == domain).documents()]
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"{domain} {i} " + " ".join(random.Random(i).sample(documents[i], 4)))
    return folder


def test_a_corpus_is_prepared_with_a_retrieved_proxy(tmp_path):
    mine = write_texts(tmp_path, "code")
    settings = {"source": "retrieved", "path": str(mine), "retrieved_share": 0.1}
    folder = prepare_small(tmp_path, proxy=settings)
    manifest = Manifest.load(folder)
    assert manifest.domains == ["prose", "code", "tables"]
    facts = manifest.details["retrieval"]
    assert sum(manifest.bytes["proxy"].values()) == facts["bytes"]
    whole = sum(sum(counts.values()) for counts in manifest.bytes.values())
    assert facts["bytes"] == pytest.approx(0.1 * whole, rel=0.2)
    assert len(RowReader(folder, "proxy")) == manifest.total_rows("proxy") > 0
    assert not set(iterate_texts(folder)) & {file.read_text() for file in mine.iterdir()}
    assert len(read_columns(folder, "split")["split"]) == 180 - sum(
        sum(reasons.values()) for reasons in manifest.details["splits"]["removed"].values()
    )

    narrower = prepare_small(tmp_path, proxy=settings | {"domains": ["tables"]})
    found = Manifest.load(narrower)
    assert [found.documents["proxy"][name] > 0 for name in found.domains] == [False, False, True]
    assert prepare_small(tmp_path, proxy=settings) == folder
    others = [{"retrieved_share": 0.05}, {"domains": ["tables"]}, {"embedder": "test_retrieval:embed"}]
    assert len({prepare_small(tmp_path, proxy=settings | other) for other in ({}, *others)}) == 4
    (mine / "0.txt").write_text("something else")
    assert prepare_small(tmp_path, proxy=settings) != folder


def embed(texts):
    return np.array([[len(t), 1000.0] for t in texts])


def test_texts_and_embedders_that_cannot_be_read_are_refused(tmp_path):
    settings = {"source": "retrieved", "path": str(tmp_path / "mine")}
    with pytest.raises(ConfigError, match=r"proxy.path = .*no such file or folder"):
        prepare_small(tmp_path, proxy=settings)
    (tmp_path / "mine").write_bytes(b"\0\1\2")
    with pytest.raises(ConfigError, match=r"proxy.path = .*of a known kind"):
        prepare_small(tmp_path, proxy=settings)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"broken.parquet"):
        prepare_small(tmp_path, proxy=settings | {"path": str(tmp_path / "broken.parquet")})
    (tmp_path / "good.txt").write_text("some words to look for")
    with pytest.raises(ConfigError, match=r"proxy.embedder = 'none:such'"):
        prepare_small(tmp_path, proxy=settings | {"path": str(tmp_path / "good.txt"), "embedder": "none:such"})
    assert not list((tmp_path / "records").glob("[!.]*"))
