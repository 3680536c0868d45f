"""The n-gram arithmetic against Python's own sets of tuples, and its speed."""

import random
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opus_jax.data.blocks import blocks
from opus_jax.data.dedup import NGRAM_WORDS, ExactCopies, HeldOutText, ngram_hashes, word_hashes

VOCABULARY = [f"word{i}" for i in range(50)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def grams_of(text: str) -> list[tuple[str, ...]]:
    words = words_of(text)
    if not words:
        return []
    return [tuple(words[i : i + NGRAM_WORDS]) for i in range(max(1, len(words) - NGRAM_WORDS + 1))]


def sentence(dice: random.Random, count: int) -> str:
    return " ".join(dice.choices(VOCABULARY, k=count))


def test_words_are_found_and_told_apart():
    texts = ["The cat -- the CAT's; x86_64\n\n", "", "...", "one"]
    hashes, owner = word_hashes(texts)
    words = [word for text in texts for word in words_of(text)]
    assert owner.tolist() == [0] * 7 + [3]
    same = np.equal.outer(hashes, hashes)
    assert np.array_equal(same, np.equal.outer(np.array(words), np.array(words)))


def test_scripts_without_spaces_give_a_word_for_each_character():
    assert len(word_hashes(["漢字漢字"])[0]) == 4
    assert len(word_hashes(["“it’s” — a café"])[0]) == 4
    assert len(word_hashes(["привет мир"])[0]) == 2


def test_a_word_hashes_alike_wherever_it_stands():
    filler = "z" * 100_003
    hashes, _ = word_hashes([f"alpha {filler} alpha", "alpha"])
    assert hashes[0] == hashes[2] == hashes[3] != hashes[1]


@given(st.lists(st.text(alphabet="ab \n.", max_size=80), max_size=6))
def test_equal_grams_have_equal_hashes_and_others_do_not(texts):
    hashes, owner = ngram_hashes(texts)
    expected = [(i, gram) for i, text in enumerate(texts) for gram in grams_of(text)]
    assert owner.tolist() == [i for i, _ in expected]
    assert len(set(hashes.tolist())) == len({gram for _, gram in expected})


def test_containment_is_the_share_of_shared_grams():
    dice = random.Random(0)
    held_out = [sentence(dice, 200), sentence(dice, 5), ""]
    shared = held_out[0].split()[50:120]
    texts = [
        held_out[0].upper().replace(" ", ",\n"),
        " ".join(shared + sentence(dice, 90).split()),
        sentence(dice, 300),
        held_out[1] + "!",
        "?!",
    ]
    known = {gram for text in held_out for gram in grams_of(text)}
    wanted = [np.mean([g in known for g in grams_of(text)]) if grams_of(text) else 0.0 for text in texts]
    found = HeldOutText(held_out).containment(texts)
    np.testing.assert_allclose(found, wanted)
    assert found[0] == found[3] == 1
    assert 0.3 < found[1] < 0.5
    assert found[2] == found[4] == 0


def test_nothing_is_contained_in_nothing():
    assert HeldOutText([]).containment(["one two three"]).tolist() == [0.0]
    assert HeldOutText(["one"]).containment([]).tolist() == []


def test_exact_copies_ignore_only_surrounding_white_space():
    copies = ExactCopies()
    assert [copies.is_new(t) for t in ("a b", " a b\n", "a  b", "A b", "a b")] == [True, False, True, True, False]


def test_blocks_keep_order_and_lose_nothing():
    items = ["x" * 400_000] * 7 + ["y"]
    grouped = list(blocks(items, len))
    assert [item for block in grouped for item in block] == items
    assert 1 < len(grouped) < 7
    assert list(blocks([], len)) == []


@pytest.mark.parametrize("megabytes", [8])
def test_speed_allows_a_minute_for_far_more_than_60_megabytes(megabytes):
    dice = random.Random(0)
    texts = [sentence(dice, 1000) for _ in range(megabytes * 1_000_000 // 7000)]
    held_out = HeldOutText(texts[: len(texts) // 10])
    started = time.process_time()
    for block in blocks(texts, len):
        held_out.containment(block)
    assert time.process_time() - started < megabytes  # measured: below a tenth of a second for each
