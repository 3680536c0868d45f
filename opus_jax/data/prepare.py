"""`opus-jax prepare`: from a corpus to a records folder, once for every configuration that matters."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

from opus_jax.config import Config, fingerprint
from opus_jax.data import embedding
from opus_jax.data.build_records import build_records
from opus_jax.data.cache import cache_folder
from opus_jax.data.corpora import load_corpus
from opus_jax.data.corpora.local import read_documents
from opus_jax.data.documents import Corpus, Document, require_known
from opus_jax.data.folder_lock import folder_lock
from opus_jax.data.given_records import given_records
from opus_jax.data.proxy_rows import more_proxy_text
from opus_jax.data.records import FORMAT_VERSION, Manifest
from opus_jax.data.token_shards import kept_tokens
from opus_jax.data.tokenizer_training import read_model
from opus_jax.errors import ConfigError, UserError

_WITHOUT_EFFECT = ("workers", "cache_dir", "weights", "lenient")  # corpus keys that do not change the records


def prepare(config: Config, progress: bool = True) -> Path:
    """The records folder of `config`, made if it is not there yet.

    The folder's name holds a fingerprint of everything that decides its content. It is filled under another name
    and renamed at the end, under a lock, so that a killed or a second preparation leaves nothing half made.

    Args:
      progress: show a progress bar on standard error.

    Raises:
      UserError: the corpus is too small for its splits, a source is unreadable, or the cached folder is damaged.
    """
    if config.corpus.name == "records":
        folder = given_records(config)
        _check(config, folder)
        return folder
    corpus = load_corpus(config.corpus)
    _require_domains(config, [domain.name for domain in corpus.domains])
    proxy = _users_texts(config)
    mark = _fingerprint(config, corpus, proxy)
    folder = cache_folder(config.corpus) / "records" / f"{corpus.name}-{mark}"
    if not folder.exists():
        with folder_lock(folder):
            if not folder.exists():
                _make(config, corpus, proxy, folder, mark, progress)
    _check(config, folder)
    return folder


def _check(config: Config, folder: Path) -> None:
    """Raise UserError unless the folder holds whole files, and the rows and domains that the configuration names."""
    manifest = Manifest.load(folder)
    manifest.check_files(folder, lenient=config.corpus.lenient)
    _require_domains(config, manifest.domains)
    _require_rows(manifest, config)


def _require_domains(config: Config, known: list[str]) -> None:
    """Raise ConfigError for a domain that the corpus lacks, before any time is spent on the others."""
    for name in config.corpus.weights:
        require_known(f"corpus.weights.{name}", [name], known)
    require_known("proxy.domains", config.proxy.domains, known)


def _users_texts(config: Config) -> list[Document]:
    """The documents at `proxy.path`, where the proxy is made of them or retrieved with them."""
    if config.proxy.source == "heldout":
        return []
    documents = list(read_documents(str(config.proxy.path), config.corpus))
    if not documents:
        raise ConfigError("proxy.path", config.proxy.path, "holds no text")
    return documents


def _fingerprint(config: Config, corpus: Corpus, proxy: list[Document]) -> str:
    decisive = {k: v for k, v in dataclasses.asdict(config.corpus).items() if k not in _WITHOUT_EFFECT}
    tokenizer: list[str | int] = [config.tokenizer.kind]
    if config.tokenizer.kind == "sentencepiece":
        path = config.tokenizer.path
        tokenizer.append(read_model(path).hex() if path else config.tokenizer.vocab_size)
    texts = [document.text for document in proxy]
    return fingerprint(FORMAT_VERSION, decisive, corpus.versions, tokenizer, texts, *_retrieval_settings(config))


def _retrieval_settings(config: Config) -> list:
    settings = config.proxy
    if settings.source != "retrieved":
        return []
    return [embedding.VERSION, settings.embedder, settings.retrieved_share, sorted(settings.domains)]


def _make(config: Config, corpus: Corpus, proxy: list[Document], folder: Path, mark: str, progress: bool) -> None:
    """Fill a folder under another name, then give it its own."""
    for left in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(left)  # by a preparation that was killed: its lock is ours now
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        manifest = build_records(config, corpus, proxy, partial, mark, progress)
        _require_rows(manifest, config)
        manifest.save(partial)
        os.rename(partial, folder)
        shutil.rmtree(kept_tokens(folder.parent, mark), ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if os.strerror(errno.ENOSPC) in str(error):  # three libraries write here, with an error class each
            raise UserError(f"no space left in {folder.parent}: free some, or set corpus.cache_dir") from None
        raise


def _require_rows(manifest: Manifest, config: Config) -> None:
    """Raise UserError where a split that this configuration reads has no row."""
    for split in ("train", "validation"):
        if not manifest.total_rows(split):
            raise UserError(f"corpus {manifest.name} has no {split} rows: give more documents")
    if not _reads_proxy(config):
        return
    wanted = config.proxy.domains if config.proxy.source == "heldout" else []
    empty = [domain for domain in wanted if not manifest.rows["proxy"][domain]]
    if empty or not manifest.total_rows("proxy"):
        where = f"domain {empty[0]!r}" if empty else "any domain"
        raise UserError(f"corpus {manifest.name} has no proxy rows in {where}: {more_proxy_text(config)}")


def _reads_proxy(config: Config) -> bool:
    directed = config.selection.method in ("opus", "paper", "greats")
    return directed or config.plan.importance is not None or config.plan.proxy_rows_share > 0
