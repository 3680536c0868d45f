"""Twelve kinds of real text out of Debian packages and one Python wheel, fetched without root.

Packages are named by pattern, so that other releases work; what was fetched stays in the cache with its checksums
(`manifest.json`) and is not fetched again, so the corpus is fixed until the cache is deleted.
"""

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from opus_jax.config import CorpusConfig
from opus_jax.data.cache import cache_folder
from opus_jax.data.corpora import store
from opus_jax.data.corpora.apt import Apt, pip_download, require_programs, sha256, unpack
from opus_jax.data.corpora.parsers.html import html_files
from opus_jax.data.corpora.parsers.plain import plain_files
from opus_jax.data.corpora.parsers.reference_works import dictd, gene_ontology, licence_texts, novels, wordnet
from opus_jax.data.corpora.parsers.sword import sword_modules
from opus_jax.data.documents import Corpus, Document, Domain, require_known
from opus_jax.errors import UserError

Parser = Callable[[Path, str], Iterator[Document]]


@dataclass(frozen=True)
class _Source:
    """Where a domain comes from: `packages` maps the pattern of a package's name to the parser of its content."""

    licence: str
    packages: dict[str, Parser]


_POSTGRES = html_files("usr/share/doc/postgresql-doc-*/html/*.html", without=r"/(bookindex|index)\.html$")
_SQLITE = html_files(
    "usr/share/doc/sqlite3/**/*.html",
    without=r"/(releaselog|images|syntax)/|/doc_\w+\.html|keyword_index|doclist|sitemap",
)
_KERNEL = plain_files("usr/share/doc/linux-doc-*/html/_sources/**/*.txt", without=r"/translations/")
_PYTHON = plain_files("usr/share/doc/python3*/html/_sources/**/*.txt")
_PIP = "pip:"  # marks a project of the Python package index instead of a Debian package

SOURCES = {
    "fiction": _Source("MIT (package); the novels are in the public domain", {"r-cran-janeaustenr": novels}),
    "scripture": _Source("public domain", {"sword-text-web": sword_modules, "sword-text-kjv": sword_modules}),
    "commentary": _Source("public domain", {"sword-comm-mhcc": sword_modules, "sword-comm-tdavid": sword_modules}),
    "politics": _Source("GPL-2", {"anarchism": html_files("usr/share/doc/anarchism/html/*.html")}),
    "dictionary": _Source("GPL-2+", {"dict-gcide": dictd}),
    "glosses": _Source("WordNet 3.0 licence", {"wordnet-base": wordnet}),
    "biology": _Source("Artistic-2.0 (package)", {"r-bioc-go[.]db": gene_ontology}),
    "kernel-docs": _Source("GPL-2 and others, by file", {"linux-doc-[0-9][0-9.]*": _KERNEL}),
    "databases": _Source(
        "PostgreSQL licence; SQLite: public domain", {"postgresql-doc-[0-9]+": _POSTGRES, "sqlite3-doc": _SQLITE}
    ),
    "python-docs": _Source("PSF-2.0 and bundled permissive licences", {"python3[.][0-9]+-doc": _PYTHON}),
    "python-code": _Source("PSF-2.0", {"libpython3[.][0-9]+-stdlib": plain_files("usr/lib/python3*/**/*.py")}),
    "legal": _Source(
        "collection: CC-BY-4.0; each licence text has its own terms", {_PIP + "scancode-toolkit-mini": licence_texts}
    ),
}


def load(config: CorpusConfig) -> Corpus:
    """The domains of `config.domains` (null = all twelve); downloads and parses what the cache lacks.

    Raises:
      ConfigError: an unknown domain.
      UserError: apt, dpkg-deb, pip or the network is missing, or a cached file is damaged.
    """
    wanted = list(SOURCES) if config.domains is None else config.domains
    require_known("corpus.domains", wanted, SOURCES)
    cache = cache_folder(config) / "debian"
    sources = {name: source for name, source in SOURCES.items() if name in wanted}
    parsers = {pattern: parser for source in sources.values() for pattern, parser in source.packages.items()}
    archives = fetch(list(parsers), cache)
    parsed = {
        pattern: _parsed(archives[pattern], parsers[pattern], cache) for pattern in _with_progress("reading", parsers)
    }
    domains = tuple(
        Domain(name, source.licence, functools.partial(_documents, [parsed[pattern] for pattern in source.packages]))
        for name, source in sources.items()
    )
    versions = {a["package"]: f"{a['version']} sha256:{a['sha256']}" for a in (archives[p] for p in parsers)}
    return Corpus("debian", domains, versions)


# ----------------------------------------------------------------------------------------------- fetching


def fetch(patterns: list[str], cache: Path) -> dict[str, dict[str, str]]:
    """Pattern -> {package, version, file, sha256}; packages that `cache` lacks are downloaded, one by one.

    The manifest is rewritten after each download, so an interrupted run continues where it stopped.
    """
    manifest_file = cache / "manifest.json"
    manifest = json.loads(manifest_file.read_text()) if manifest_file.is_file() else {}
    missing = [p for p in patterns if p not in manifest or not (cache / "archives" / manifest[p]["file"]).is_file()]
    named = [p for p in missing if not p.startswith(_PIP)]
    if named:
        require_programs("apt-get", "apt-cache", "dpkg-deb")
    apt = Apt(cache / "apt") if named else None
    packages = apt.resolve(named) if apt else {}
    for pattern in _with_progress("downloading", missing):
        (cache / "archives").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            if apt and pattern in packages:
                file = apt.download(packages[pattern], Path(folder))
            else:
                file = pip_download(pattern.removeprefix(_PIP), Path(folder))
            manifest[pattern] = _entry(file)
            file.replace(cache / "archives" / file.name)
        _write(manifest_file, json.dumps(manifest, indent=2, sort_keys=True))
    return {pattern: manifest[pattern] for pattern in patterns}


def _entry(file: Path) -> dict[str, str]:
    """File names are package_version_architecture.deb and project-version-tags.whl; apt writes `:` as %3a."""
    package, version = file.stem.split("_")[:2] if file.suffix == ".deb" else file.stem.split("-")[:2]
    return {"package": package, "version": unquote(version), "file": file.name, "sha256": sha256(file)}


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(file)


# ------------------------------------------------------------------------------------------------ parsing


def _parsed(archive: dict[str, str], parser: Parser, cache: Path) -> Path:
    """The file of documents made from an archive by this version of the parsers."""
    parsed = cache / "documents" / f"{archive['package']}-{archive['sha256'][:12]}-{store.reader_version()}.jsonl.zst"
    if parsed.is_file():
        return parsed
    file = cache / "archives" / archive["file"]
    if sha256(file) != archive["sha256"]:
        raise UserError(f"{file} is not what was downloaded (its checksum differs): delete it and run again")
    label = f"{archive['package']} {archive['version']}"
    if file.suffix == ".whl":
        store.save(parser(file, label), parsed)
        return parsed
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        unpack(file, Path(folder))
        store.save(parser(Path(folder), label), parsed)
    return parsed


def _documents(files: list[Path]) -> Iterator[Document]:
    return itertools.chain.from_iterable(map(store.read, files))


def _with_progress(what: str, patterns: Iterable[str]) -> Iterator[str]:
    patterns = list(patterns)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not patterns) as progress:
        task = progress.add_task(what, total=len(patterns))
        for pattern in patterns:
            progress.update(task, description=f"{what} {pattern.removeprefix(_PIP)}")
            yield pattern
            progress.advance(task)
