"""The text that every Python installation holds: nothing to download.

Domains: documentation (docstrings, pydoc topics), code (source without docstrings), tests, licences, descriptions (of
packages) and tables (generated sources, encodings, data files: of little value to a language model, on purpose).

Of the standard library all modules are read. Of installed packages, tests and data, files are read in the order of a
hash of their names up to a number of bytes, so that a large environment takes no longer than a small one and no
package dominates. What is read varies with what is installed: `versions["manifest"]` is a hash of the whole list.
"""

import ast
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from opus_jax.config import CorpusConfig
from opus_jax.data.corpora import python_source
from opus_jax.data.corpora.pieces import PIECE_CHARACTERS, pieces
from opus_jax.data.documents import Corpus, Document, Domain, Problems

_MIXED = "PSF-2.0 (standard library) and each package's own licence"
LICENCES = {
    "documentation": _MIXED,
    "code": _MIXED,
    "tests": _MIXED,
    "licences": "texts of licences: each may be copied verbatim",
    "descriptions": "each package's own licence",
    "tables": _MIXED,
}

_BUDGET = {"modules": 6_000_000, "tests": 4_000_000, "data": 2_500_000}  # bytes read
_LARGEST_FILE = 1_000_000
_SHORTEST_DOCUMENT = 200  # characters
_PIECE_CHARACTERS = {"licences": 4_000, "descriptions": 4_000}  # small domains, which still need held-out documents
_DATA_SUFFIXES = {".csv", ".json", ".xml", ".tsv"}
_LICENCE_NAME = re.compile(r"LICEN[CS]E|COPYING|NOTICE|COPYRIGHT", re.IGNORECASE)
_TEST_NAME = re.compile(r"test_|conftest\.|.*_test\.py")
_TOPICS = "pydoc_data/topics.py"


class _File(NamedTuple):
    path: Path
    name: str  # below the library's root, with forward slashes
    package: str  # name and version
    size: int

    @property
    def label(self) -> str:
        return f"{self.package}: {self.name}"


def load(config: CorpusConfig) -> Corpus:
    """The corpus of the running Python. Listing files is quick; reading them takes seconds, once for each load."""
    listed = [*_standard_library(), *_installed_packages()]
    problems = Problems()
    read = functools.cache(lambda: _read(_sample(listed), problems))
    domains = tuple(
        Domain(name, note, functools.partial(lambda name: iter(read()[name]), name)) for name, note in LICENCES.items()
    )
    return Corpus("python-env", domains, _versions(listed), problems)


def _versions(files: list[_File]) -> dict[str, str]:
    lines = sorted(f"{file.package}/{file.name} {file.size}" for file in files)
    manifest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    return {"python": platform.python_version(), "files": str(len(files)), "manifest": manifest}


# --------------------------------------------------------------------------------------- which files there are


def _standard_library() -> Iterator[_File]:
    root = Path(sysconfig.get_path("stdlib"))
    package = f"python {platform.python_version()}"
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if _kind(relative) and path.is_file():
                yield _File(path, relative, package, path.stat().st_size)


def _installed_packages() -> Iterator[_File]:
    seen = {"opus-jax"}  # the corpus must not change with this program's own source
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if not name or name in seen:
            continue
        seen.add(name)
        package = f"{name} {distribution.version}"
        for file in distribution.files or ():
            if file.size and ".." not in file.parts and _kind(file.as_posix()):
                path = Path(str(distribution.locate_file(file)))
                yield _File(path, file.as_posix(), package, file.size)


def _kind(name: str) -> str | None:
    """What a file is read as: modules, tests, data, licences, descriptions, or nothing."""
    path = PurePosixPath(name)
    described = any(part.endswith(".dist-info") for part in path.parts)
    named = _LICENCE_NAME.match(path.name) and path.suffix in ("", ".txt", ".md", ".rst")
    if named or "licenses" in path.parts:
        return "licences"
    if described:
        return {"METADATA": "descriptions", "RECORD": "data"}.get(path.name)
    if path.suffix == ".py":
        folders = {"test", "tests", "idle_test"}.intersection(path.parts)
        return "tests" if folders or _TEST_NAME.match(path.name) else "modules"
    return "data" if path.suffix in _DATA_SUFFIXES else None


def _sample(files: list[_File]) -> list[tuple[str, _File]]:
    """(kind, file) for the files that are read, in the order of their packages and names."""
    chosen = []
    used: Counter[str] = Counter()
    for file in sorted(files, key=lambda f: hashlib.blake2b(f.name.encode("utf-8", "surrogateescape")).digest()):
        kind = _kind(file.name) or "data"  # a listed file has a kind
        whole = kind == "modules" and file.package.startswith("python ")
        limit = math.inf if whole else _BUDGET.get(kind, math.inf)
        if file.size <= _LARGEST_FILE and used[kind] + file.size <= limit:
            used[kind] += 0 if whole else file.size
            chosen.append((kind, file))
    return sorted(chosen, key=lambda pair: (pair[1].package, pair[1].name))


# ------------------------------------------------------------------------------------------- reading them


def _read(files: list[tuple[str, _File]], problems: Problems) -> dict[str, list[Document]]:
    domains: dict[str, list[Document]] = {name: [] for name in LICENCES}
    for kind, file in files:
        problems.begin(file.label)
        try:
            text = file.path.read_bytes().decode().replace("\r\n", "\n")
        except OSError as error:
            problems.add(file.label, str(error.strerror))
            continue
        except UnicodeDecodeError:
            problems.add(file.label, "not UTF-8")
            continue
        for domain, part in _READERS[kind](text, file, problems):
            domains[domain].extend(_documents(part, file.label, _PIECE_CHARACTERS.get(kind, PIECE_CHARACTERS)))
    return domains


def _documents(text: str, label: str, size: int) -> Iterator[Document]:
    parts = list(pieces(text, size))
    for number, part in enumerate(parts, 1):
        if len(part) >= _SHORTEST_DOCUMENT:
            yield Document(part, f"{label} ({number} of {len(parts)})" if len(parts) > 1 else label)


def _module(text: str, file: _File, problems: Problems) -> Iterator[tuple[str, str]]:
    if file.name == _TOPICS:
        yield from (("documentation", topic) for topic in _topics(text))
    elif python_source.is_table(text):
        yield "tables", text
    elif (tree := python_source.parse(text)) is None:
        problems.add(file.label, "not valid Python")
    elif python_source.is_generated(text):
        yield "tables", python_source.without_docstrings(text, tree)
    else:
        dotted = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield "documentation", python_source.documentation(tree, dotted)
        yield "code", python_source.without_docstrings(text, tree)


def _topics(text: str) -> Iterator[str]:
    tree = python_source.parse(text)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (topic for topic in ast.literal_eval(node.value).values() if isinstance(topic, str))


def _description(text: str, file: _File, problems: Problems) -> Iterator[tuple[str, str]]:
    message = Parser().parsestr(text)
    body = str(message.get_payload()).strip() or message.get("Description", "")
    yield "descriptions", f"{message['Name']}: {message.get('Summary', '')}\n\n{body}"


_READERS: dict[str, Callable[[str, _File, Problems], Iterable[tuple[str, str]]]] = {
    "modules": _module,
    "tests": lambda text, file, problems: [("tests", text)],
    "data": lambda text, file, problems: [("tables", text)],
    "licences": lambda text, file, problems: [("licences", text)],
    "descriptions": _description,
}
