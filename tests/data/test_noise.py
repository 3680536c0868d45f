"""Each transform corrupts in its own way, the stated share is met, and wrong entries are named."""

import pytest

from opus_jax.data.documents import Document
from opus_jax.data.noise import TRANSFORMS, Noise, read_noise
from opus_jax.errors import ConfigError

TEXT = "\n".join(
    f"The {i}th line of this document tells of rivers, hills and the weather of day {i}." for i in range(40)
)


def corrupted(transform: str, text: str = TEXT) -> str:
    return Noise(transform, 1.0)(Document(text, "s"), "web").text


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_corruption_is_reproducible_and_recorded(transform):
    first, second = (Noise(transform, 1.0)(Document(TEXT, "s"), "web") for _ in range(2))
    assert first == second
    assert first.text != TEXT
    assert (first.source, first.noise) == ("s", transform)
    assert Noise(transform, 1.0)(Document(TEXT + "!", "s"), "web").text[:200] != first.text[:200]


def test_shuffle_keeps_the_words_and_the_white_space():
    assert sorted(corrupted("shuffle").split()) == sorted(TEXT.split())
    assert corrupted("shuffle").count("\n") == TEXT.count("\n")


def test_characters_changes_about_a_fifth():
    noisy = corrupted("characters")
    assert noisy.count("\n") == TEXT.count("\n")
    assert 0.9 < len(noisy) / len(TEXT) < 1.1
    plain = corrupted("characters", "a" * 3000)
    assert abs(plain.count("a") / 3000 - (1 + 0.2 / 3 - 0.4 / 3)) < 0.03
    assert abs((len(plain) - plain.count("a")) / 3000 - 0.2 / 3) < 0.03


def test_repetition_has_few_words_of_the_document():
    noisy = corrupted("repetition")
    assert len(noisy) == len(TEXT)
    assert len(set(noisy.split())) <= 26
    assert len(set(noisy.split()) & set(TEXT.split())) >= 4


def test_boilerplate_has_the_length_but_not_the_text():
    noisy = corrupted("boilerplate")
    assert len(noisy) == len(TEXT)
    assert "rivers" not in noisy


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("text", ["x", " one ", "wörd\nzwei", "漢字"])
def test_tiny_texts_survive(transform, text):
    assert isinstance(corrupted(transform, text), str)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_is_met(share):
    noise = Noise("shuffle", share)
    hit = sum(noise(Document(f"{TEXT} {i}", "s"), "web").noise is not None for i in range(1000)) / 1000
    assert abs(hit - share) < 0.05


def test_entries_are_read():
    assert read_noise({"web": "shuffle:0.5"}, ["web", "books"]) == {"web": Noise("shuffle", 0.5)}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"wbe": "shuffle:0.5"}, r"corpus\.noise\.wbe.*nearest is 'web'"),
        ({"web": "shufle:0.5"}, r"corpus\.noise\.web.*nearest is shuffle"),
        ({"web": "shuffle:1.5"}, r"corpus\.noise\.web.*between 0 and 1"),
        ({"web": "shuffle:-0.1"}, r"between 0 and 1"),
        ({"web": "shuffle:nan"}, r"between 0 and 1"),
        ({"web": "shuffle:"}, r"between 0 and 1"),
        ({"web": "shuffle"}, r"between 0 and 1"),
        ({"web": "shuffle:many"}, r"between 0 and 1"),
    ],
)
def test_wrong_entries_are_named(entry, message):
    with pytest.raises(ConfigError, match=message):
        read_noise(entry, ["web", "books"])
