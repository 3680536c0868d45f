"""Corrupt a stated share of a domain's documents, reproducibly.

`corpus.noise` maps a domain to `transform:share`, for example `web: shuffle:0.5`. Which documents are corrupted, and
how, depends only on the document's text, the domain and the transform, so two runs corrupt the same documents alike.
"""

import dataclasses
import difflib
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from opus_jax.data.documents import Document, require_known
from opus_jax.errors import ConfigError

_CHARACTER_SHARE = 0.2  # of the characters, replaced, dropped or doubled
_REPEATED_WORDS = (4, 24)  # length of the phrase that repetition repeats
_PASSAGES = (
    "This website uses cookies to improve your experience. By continuing to browse you accept our cookie policy. ",
    "Click here to subscribe to our newsletter and never miss an update! Share this page on social media. ",
    "Home | About us | Products | Contact | Privacy policy | Terms of service | Site map | Back to top\n",
    "All rights reserved. No part of this publication may be reproduced without prior written permission. ",
    "You must be logged in to post a comment. Log in or register. Forgotten your password?\n",
    "Loading... Please enable JavaScript in your browser to view this content. Error 404: page not found.\n",
)


@dataclass(frozen=True)
class Noise:
    """One entry of `corpus.noise`: `share` of the documents go through `transform`."""

    transform: str
    share: float

    def __call__(self, document: Document, domain: str) -> Document:
        """The document, corrupted when its hash falls within the share; `document.noise` then names the transform."""
        generator = _generator(document, domain, self.transform)
        if generator.random() >= self.share:
            return document
        corrupted = TRANSFORMS[self.transform](document.text, generator)
        return dataclasses.replace(document, text=corrupted, noise=self.transform)


def read_noise(noise: Mapping[str, str], domains: Iterable[str]) -> dict[str, Noise]:
    """Check and read `corpus.noise`.

    Raises:
      ConfigError: an unknown domain or transform, or a share outside 0 to 1; the message names the key.
    """
    known = list(domains)
    for domain in noise:
        require_known(f"corpus.noise.{domain}", [domain], known)
    return {domain: _read_entry(f"corpus.noise.{domain}", text) for domain, text in noise.items()}


def _read_entry(key: str, text: str) -> Noise:
    transform, colon, share_text = str(text).partition(":")
    if transform not in TRANSFORMS:
        nearest = difflib.get_close_matches(transform, TRANSFORMS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            key,
            text,
            f"must be transform:share with transform one of {', '.join(TRANSFORMS)}; the nearest is {nearest}",
        )
    try:
        share = float(share_text)
    except ValueError:
        share = -1.0
    if not colon or not 0 <= share <= 1:
        raise ConfigError(key, text, f"must be {transform}:share with a share between 0 and 1")
    return Noise(transform, share)


def _generator(document: Document, domain: str, transform: str) -> random.Random:
    digest = hashlib.blake2b(f"{domain}\0{transform}\0{document.text}".encode(), digest_size=8, person=b"corpus-noise")
    return random.Random(int.from_bytes(digest.digest(), "little"))


# ------------------------------------------------------------------------------------------- transforms


def shuffle(text: str, generator: random.Random) -> str:
    """The same words in random order; the white space between them stays where it is."""
    pieces = re.split(r"(\s+)", text)
    words = pieces[::2]
    generator.shuffle(words)
    pieces[::2] = words
    return "".join(pieces)


def characters(text: str, generator: random.Random) -> str:
    """One character in five is replaced by another letter, dropped, or doubled, as in bad optical recognition."""
    out = []
    for character in text:
        draw = generator.random() / _CHARACTER_SHARE
        if draw >= 1 or character == "\n":
            out.append(character)
        elif draw < 1 / 3:
            out.append(generator.choice("abcdefghijklmnopqrstuvwxyz0123456789#%~"))
        elif draw < 2 / 3:
            out.append(character * 2)
    return "".join(out)


def repetition(text: str, generator: random.Random) -> str:
    """A phrase of the document, repeated to the document's length."""
    words = text.split()
    length = min(len(words), generator.randint(*_REPEATED_WORDS))
    start = generator.randrange(len(words) - length + 1)
    phrase = " ".join(words[start : start + length]) + " "
    return (phrase * (len(text) // len(phrase) + 1))[: len(text)]


def boilerplate(text: str, generator: random.Random) -> str:
    """Web-page furniture (cookie notices, navigation, share buttons) of the document's length in place of its text."""
    out, size = [], 0
    while size < len(text):
        out.append(generator.choice(_PASSAGES))
        size += len(out[-1])
    return "".join(out)[: len(text)]


TRANSFORMS: dict[str, Callable[[str, random.Random], str]] = {
    "shuffle": shuffle,
    "characters": characters,
    "repetition": repetition,
    "boilerplate": boilerplate,
}
