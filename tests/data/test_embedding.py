"""Embeddings are unit vectors, the same everywhere, and alike for texts that are alike."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from opus_jax.data.embedding import EMBEDDED_CHARACTERS, centred, hashing_embedder, load_embedder
from opus_jax.errors import ConfigError

KINDS = {
    "code": ["def", "return", "self", "import", "(x)", "== 0:", "for", "in", "range(n)"],
    "verse": ["thou", "shalt", "heaven", "love", "the", "moon", "and", "weep", "o'er"],
    "law": ["section", "pursuant", "licensee", "the", "and", "warranty", "hereby", "party", "liable"],
}


def text(kind: str, seed: int, words: int = 80) -> str:
    return " ".join(random.Random(f"{kind}{seed}").choices(KINDS[kind], k=words))


def test_rows_are_unit_vectors_one_for_each_text():
    rows = hashing_embedder(64)(["a few words", "", "x", "日本語のテキスト", " \n"])
    assert rows.shape == (5, 64)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), [1, 0, 1, 1, 0], atol=1e-6)
    assert hashing_embedder()([]).shape == (0, 256)


def test_a_text_is_embedded_alike_alone_and_in_company():
    texts = [text(kind, i) for i in range(3) for kind in KINDS]
    embed = hashing_embedder()
    assert np.allclose(embed(texts), np.concatenate([embed([t]) for t in texts]), atol=1e-6)


def test_the_same_text_gives_the_same_row_in_another_process():
    code = "from opus_jax.data.embedding import *; print(repr(hashing_embedder(8)(['The cat sat']).tolist()))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert runs == {repr(hashing_embedder(8)(["The cat sat"]).tolist()) + "\n"}


def test_alike_texts_are_near_and_order_of_words_counts():
    embed = hashing_embedder()
    a, b, other, turned = embed(
        ["the cat sat on the mat", "The cat sat on a mat", "return x == 0", "mat the on sat cat the"]
    )
    assert a @ b > 0.6 > 0.2 > a @ other
    assert a @ turned < 0.99


def test_kinds_of_text_are_told_apart():
    names = [kind for kind in KINDS for _ in range(20)]
    rows = hashing_embedder()([text(kind, i) for i, kind in enumerate(names)])
    rows = centred(rows, rows.mean(0))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    alike = rows @ rows.T
    np.fill_diagonal(alike, -1)
    assert all(names[i] == names[j] for i, j in enumerate(alike.argmax(1)))
    same = np.equal.outer(names, names)
    assert alike[same & (alike > -1)].mean() > 0.3
    assert alike[~same].mean() < 0


def test_two_megabytes_a_second():
    texts = [text("law", i, 500) for i in range(400)]
    embed = hashing_embedder()
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        embed(texts)
        best = max(best, sum(map(len, texts)) / (time.process_time() - start))
    assert best > 2e6


def test_only_the_beginning_of_a_text_is_embedded():
    embed = load_embedder("hashing")
    start = "word " * (EMBEDDED_CHARACTERS // 5 + 1)
    longer, same, other = embed([start + "tail", start + "another", "tail " + start])
    assert np.array_equal(longer, same)
    assert not np.array_equal(longer, other)


def test_an_embedder_of_ones_own(monkeypatch, tmp_path):
    (tmp_path / "mine_embed.py").write_text(
        "import numpy as np\n"
        "def embed(texts): return np.array([[len(t), 1.0] for t in texts])\n"
        "def short(texts): return np.ones((1, 4))\n"
        "def nan(texts): return np.full((len(texts), 2), np.nan)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = load_embedder("mine_embed:embed")(["abc", ""])
    assert np.allclose(rows, [[3 / 10**0.5, 1 / 10**0.5], [0, 1]])
    for name in ("short", "nan"):
        with pytest.raises(ConfigError, match=r"proxy.embedder = 'mine_embed.*finite numbers of shape \[3, D\]"):
            load_embedder(f"mine_embed:{name}")(["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"must name a function"):
        load_embedder("mine_embed:number")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hash", "must be hashing or package.module:function"),
        ("a:", "must be hashing or package.module:function"),
        ("no_such_package:embed", "cannot be imported"),
        ("json:no_such", "cannot be imported"),
    ],
)
def test_an_embedder_that_is_not_there_is_refused(name, reason):
    with pytest.raises(ConfigError, match=rf"proxy.embedder = '{name}'.*{reason}"):
        load_embedder(name)
