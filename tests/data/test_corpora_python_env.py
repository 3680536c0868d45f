"""The corpus of the running Python: large enough, reproducible, each domain what its name says."""

import ast
import re

import pytest

from opus_jax.config import CorpusConfig
from opus_jax.data.corpora import load_corpus, python_env, python_source
from opus_jax.data.corpora.pieces import pieces
from opus_jax.errors import ConfigError

SOURCE = '''"""Module about rivers."""
import os

class River:
    """A river."""

    length = 3

    def flow(self):
        """Let it flow.

        For a while.
        """

    def stop(self): """Not alone on its line."""

    async def wait(self):
        'Wait.'
        return "not a docstring"


def table():
    """One"""; return 1
'''


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(CorpusConfig())


@pytest.fixture(scope="module")
def texts(corpus):
    return {domain.name: [d.text for d in domain.documents()] for domain in corpus.domains}


def test_there_are_ten_megabytes_in_documents_of_readable_size(texts):
    sizes = {name: sum(len(t.encode()) for t in found) for name, found in texts.items()}
    assert sum(sizes.values()) > 10_000_000, sizes
    assert set(sizes) == {"documentation", "code", "tests", "licences", "descriptions", "tables"}
    assert all(size > 50_000 for size in sizes.values()), sizes
    longest = max(len(t) for found in texts.values() for t in found)
    assert longest < 50_000


def test_the_same_installation_gives_the_same_corpus(corpus):
    assert load_corpus(CorpusConfig()).versions == corpus.versions
    assert re.fullmatch("[0-9a-f]{64}", corpus.versions["manifest"])
    listed = [*python_env._standard_library(), *python_env._installed_packages()]
    files = python_env._sample(listed)
    assert python_env._sample(listed[::-1]) == files
    first, second = (python_env._read(files[::50], python_env.Problems()) for _ in range(2))
    assert first == second


def test_domains_are_what_they_are_called(texts):
    assert sum("licen" in t.lower() for t in texts["licences"]) > 0.6 * len(texts["licences"])
    defs = {name: sum(len(re.findall(r"(?m)^\s*def ", t)) for t in found) for name, found in texts.items()}
    size = {name: sum(map(len, found)) for name, found in texts.items()}
    assert defs["code"] / size["code"] > 10 * defs["documentation"] / size["documentation"]
    assert sum("assert" in t for t in texts["tests"]) > 0.5 * len(texts["tests"])


def test_documentation_includes_the_topics_of_pydoc(corpus):
    sources = {d.source for d in corpus.domains[0].documents() if "pydoc_data/topics" in d.source}
    assert sources


def test_what_cannot_be_read_is_counted(tmp_path):
    good, binary, wrong = (tmp_path / name for name in ("good.py", "binary.py", "wrong.py"))
    good.write_text(SOURCE * 20)
    binary.write_bytes(b"\xff\xfe\x00")
    wrong.write_text("def (:\n" * 50)
    files = [("modules", python_env._File(p, p.name, "pack 1", 1)) for p in (good, binary, wrong)]
    problems = python_env.Problems()
    domains = python_env._read(files, problems)
    assert domains["code"][0].source.startswith("pack 1: good.py")
    assert problems.to_mapping()["counts"] == {
        "pack 1: binary.py: not UTF-8": 1,
        "pack 1: wrong.py: not valid Python": 1,
    }


def test_domains_are_chosen_and_unknown_ones_named():
    corpus = load_corpus(CorpusConfig(domains=["tables", "documentation"]))
    assert [d.name for d in corpus.domains] == ["documentation", "tables"]
    with pytest.raises(ConfigError, match=r"corpus\.domains = 'tabels'.*nearest is 'tables'"):
        load_corpus(CorpusConfig(domains=["tabels"]))
    with pytest.raises(ConfigError, match=r"corpus\.noise\.code"):
        load_corpus(CorpusConfig(domains=["tables"], noise={"code": "shuffle:0.5"}))


def test_docstrings_are_taken_out_and_the_rest_still_parses():
    tree = python_source.parse(SOURCE)
    prose = python_source.documentation(tree, "water")
    assert prose.split("\n\n\n")[0] == "water\n\nModule about rivers."
    assert "water.River.flow\n\nLet it flow.\n\nFor a while." in prose
    code = python_source.without_docstrings(SOURCE, tree)
    ast.parse(code)
    for gone in ("about rivers", "A river.", "Let it flow", "For a while", "Wait."):
        assert gone not in code
    assert "not a docstring" in code
    assert "    def flow(self):\n        ...\n" in code


def test_sources_no_one_wrote_are_recognised():
    assert python_source.is_table("NAMES = {\n" + "    'a': 0x01,\n" * 60 + "}\n")
    assert not python_source.is_table(SOURCE * 10)
    assert python_source.is_generated("# --- THIS FILE IS AUTO-GENERATED ---\nx = 1\n")
    assert not python_source.is_generated(SOURCE)
    assert python_source.parse("def (:") is None
    assert python_source.parse("x = '\0'") is None


@pytest.mark.parametrize("size", [10, 100, 1000])
def test_pieces_are_balanced_and_lose_no_text(size):
    text = "\n\n".join(f"Paragraph {i}\n  indented " + "word " * (i % 17) for i in range(60)) + "\n" + "x" * 2500
    parts = list(pieces(text, size))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert max(map(len, parts)) <= 2 * size
    assert min(map(len, parts)) > min(size, 100) / 8
    assert list(pieces("short\n", size)) == ["short"]
    assert list(pieces(" \n\n", size)) == []
