"""Text files, JSON lines and Parquet of the user's own, on this machine or at an address (gs://, s3://).

A domain is a folder, a file, or the value of a field. What cannot be read is counted in `corpus.problems` with the
name of the file and the line; with `corpus.strict` the first such line is an error.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from opus_jax.config import CorpusConfig, fingerprint
from opus_jax.data.cache import cache_folder
from opus_jax.data.corpora import store
from opus_jax.data.corpora.records_file import READABLE, check_text, is_readable, read_records
from opus_jax.data.documents import Corpus, Document, Domain, Problems
from opus_jax.data.remote import is_remote, local_copy
from opus_jax.errors import ConfigError, UserError

_LICENCE = "the user's own files"


def load(config: CorpusConfig) -> Corpus:
    """The corpus at `config.path`, a file or a folder.

    Raises:
      ConfigError: the path does not exist, or holds no file of a known kind.
      UserError: with `domain_by = field`, a file lacks the field; with `strict`, a line cannot be read.
    """
    root = _on_this_machine(str(config.path), config)
    files = _list_files(root, "corpus.path")
    versions = {"files": str(len(files)), "content": _content_hash(root, files)}
    if config.domain_by == "field":
        return _by_field(root, files, config, versions)
    problems = Problems()
    places: dict[str, list[Path]] = {}
    for file in files:
        places.setdefault(_place(file, root, config.domain_by), []).append(file)
    domains = tuple(
        Domain(name, _LICENCE, functools.partial(_documents, inside, root, config, problems))
        for name, inside in sorted(places.items())
    )
    return Corpus("local", domains, versions, problems)


def read_documents(path: str | Path, config: CorpusConfig, key: str = "proxy.path") -> Iterator[Document]:
    """The documents of a file or folder, whatever their domains, read with the field names of `config`.

    Nothing is left out: these are the user's own proxy documents, and a line that cannot be read is an error.

    Raises:
      ConfigError: the path does not exist, or holds no file of a known kind; the message names `key`.
      UserError: a line that cannot be read, with its file and number.
    """
    root = _on_this_machine(path, config)
    for file in _list_files(root, key):
        yield from (document for _, document in _read(file, root, config, Problems(), strict=True))


def _on_this_machine(path: str | Path, config: CorpusConfig) -> Path:
    """The path itself, or the copy of what is at an address."""
    return local_copy(str(path), cache_folder(config)) if is_remote(path) else Path(path).expanduser()


def _documents(files: list[Path], root: Path, config: CorpusConfig, problems: Problems) -> Iterator[Document]:
    for file in files:
        problems.begin(_name(file, root))
        yield from (document for _, document in _read(file, root, config, problems, config.strict))


def _by_field(root: Path, files: list[Path], config: CorpusConfig, versions: dict[str, str]) -> Corpus:
    """Sorts all records by their domain into the cache: they are read once, however many domains there are."""
    mark = fingerprint(versions, config.text_field, config.domain_field, config.strict, store.reader_version())
    folder = cache_folder(config) / "local" / mark
    if not store.is_partitioned(folder):
        problems = Problems()
        pairs = (pair for file in files for pair in _read(file, root, config, problems, config.strict, True))
        store.partition(pairs, folder, problems)
    parts, problems = store.partitioned(folder)
    domains = tuple(Domain(name, _LICENCE, functools.partial(store.read, part)) for name, part in parts.items())
    return Corpus("local", domains, versions, problems)


def _read(
    file: Path, root: Path, config: CorpusConfig, problems: Problems, strict: bool, with_domain: bool = False
) -> Iterator[tuple[str, Document]]:
    """(domain or "", document) for the records of a file."""
    name = _name(file, root)
    fields = (config.text_field, config.domain_field) if with_domain else (config.text_field,)

    def report(reason: str, line: int | None) -> None:
        if strict:
            place = f"{file}:{line}" if line else str(file)
            hint = ", or count such lines with corpus.strict=false" if config.strict else ""
            raise UserError(f"{place}: {reason}: correct it{hint}")
        problems.add(name, reason, line)

    for position, (record, line) in enumerate(read_records(file, fields, report), 1):
        text, domain = record.get(config.text_field), str(record.get(config.domain_field, "")) if with_domain else ""
        wrong = check_text(text, config.text_field)
        if wrong or (with_domain and not domain.strip()):
            report(wrong or f"no field {config.domain_field!r}", line)
        else:
            yield domain, Document(str(text), f"{name}:{line or position}")


def _list_files(root: Path, key: str) -> list[Path]:
    if not root.exists():
        raise ConfigError(key, str(root), "no such file or folder")
    found = [root] if root.is_file() else [path for path in sorted(root.rglob("*")) if path.is_file()]
    hidden = [path for path in found if any(part.startswith(".") for part in path.relative_to(root).parts)]
    files = [path for path in found if path not in hidden and is_readable(path)]
    if not files:
        raise ConfigError(key, str(root), f"must be or hold a file of a known kind: {READABLE}")
    return files


def _place(file: Path, root: Path, domain_by: str) -> str:
    """The domain of a file: the first folder below the root, or the file's own path without its endings."""
    relative = Path(_name(file, root))
    if domain_by == "folder" and root.is_dir():
        return relative.parts[0] if len(relative.parts) > 1 else root.resolve().name
    stem = relative.name.split(".")[0] or relative.name
    return relative.with_name(stem).as_posix()


def _name(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def _content_hash(root: Path, files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(f"{_name(file, root)}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
