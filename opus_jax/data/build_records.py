"""Filling a records folder: documents, tokenizer, tokens, rows; the manifest is written last, by the caller."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from opus_jax.config import Config
from opus_jax.data.documents import Corpus, Document
from opus_jax.data.documents_table import iterate_texts, read_columns, write_documents
from opus_jax.data.embedding import load_embedder
from opus_jax.data.packing import segments_per_row
from opus_jax.data.progress import progress_bar
from opus_jax.data.ray_engine import require_ray, run_on_ray
from opus_jax.data.record_writer import TokenizedDocuments, WrittenSplit, write_split
from opus_jax.data.records import FORMAT_VERSION, SPLITS, Counts, Manifest, sha256
from opus_jax.data.retrieval import Retrieval
from opus_jax.data.splits import PROXY_FILES, split_documents
from opus_jax.data.token_shards import kept_tokens, tokenize_shards
from opus_jax.data.tokenize_documents import tokenize_texts, usable_cores
from opus_jax.data.tokenizer import Tokenizer
from opus_jax.data.tokenizer_training import train_tokenizer

_SPOOL = "tokens.spool"


def build_records(
    config: Config, corpus: Corpus, proxy: list[Document], folder: Path, fingerprint: str, progress: bool
) -> Manifest:
    """Write everything but the manifest into the empty `folder`, and return the manifest.

    Args:
      proxy: the user's own documents. With `proxy.source = files` they become the last domain, which has no rows for
        training; with `retrieved` they are what is looked for, and are not written.
    """
    if config.prepare.engine == "ray":
        require_ray()
    retrieval = _retrieval(config, proxy)
    written_proxy = [] if retrieval else proxy
    names = [domain.name for domain in corpus.domains] + [PROXY_FILES] * bool(written_proxy)
    licences = [domain.licence for domain in corpus.domains] + ["the user's own files"] * bool(written_proxy)
    with progress_bar(progress) as bar:
        placed, removed = split_documents(corpus, config.corpus, written_proxy, retrieval)
        write_documents(bar.track(placed, total=None, description="reading documents"), licences, folder)
        tokenizer = _make_tokenizer(config, folder, bar)
        documents = _tokenize(config, folder, fingerprint, bar)
        written = {
            split: write_split(folder, split, documents, len(names), tokenizer, config.corpus.row_tokens)
            for split in bar.track(SPLITS, description="writing rows")
        }
        counts = _count(documents, folder, names)
        (folder / _SPOOL).unlink()
        details = {
            "versions": corpus.versions,
            "problems": corpus.problems.to_mapping(),
            "splits": removed.to_mapping(),
            "noise": config.corpus.noise,
        }
        if retrieval:
            details["retrieval"] = retrieval.facts
        return Manifest(
            name=corpus.name,
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            row_tokens=config.corpus.row_tokens,
            segments_per_row=segments_per_row(config.corpus.row_tokens),
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            domains=names,
            licences=licences,
            rows={split: dict(zip(names, w.domain_rows, strict=True)) for split, w in written.items()},
            padding={split: round(w.padding, 6) for split, w in written.items()},
            shards={split: list(w.shards) for split, w in written.items()},
            files=_file_facts(folder, written),
            details=details,
            **counts,
        )


def _retrieval(config: Config, texts: list[Document]) -> Retrieval | None:
    settings = config.proxy
    if settings.source != "retrieved":
        return None
    return Retrieval(texts, load_embedder(settings.embedder), settings.retrieved_share, settings.domains)


def _make_tokenizer(config: Config, folder: Path, bar: Progress) -> Tokenizer:
    """Trained on training documents only; held-out text stays unseen."""
    training = bar.track(iterate_texts(folder, "train"), total=None, description="training tokenizer")
    return train_tokenizer(config.tokenizer, training, folder)


def _tokenize(config: Config, folder: Path, mark: str, bar: Progress) -> TokenizedDocuments:
    table = read_columns(folder, "domain_id", "split")
    if config.prepare.engine == "ray":
        lengths = tokenize_shards(folder, kept_tokens(folder.parent, mark), folder / _SPOOL, run_on_ray, bar)
    else:
        workers = config.corpus.workers or usable_cores()
        texts = bar.track(iterate_texts(folder), total=len(table["split"]), description="tokenizing")
        lengths = tokenize_texts(texts, folder, workers, folder / _SPOOL)
    return TokenizedDocuments(
        tokens=np.memmap(folder / _SPOOL, np.int32, "r") if lengths.sum() else np.zeros(0, np.int32),
        lengths=lengths,
        domains=np.array(table["domain_id"], np.int64),
        splits=np.array([SPLITS.index(split) for split in table["split"]], np.int64),
    )


def _count(documents: TokenizedDocuments, folder: Path, names: list[str]) -> dict[str, Counts]:
    """Documents, source tokens and UTF-8 bytes, by split and domain."""
    text_bytes = np.array(read_columns(folder, "bytes")["bytes"], np.int64)
    values = {"documents": np.ones_like(documents.lengths), "tokens": documents.lengths, "bytes": text_bytes}
    cell = documents.splits * len(names) + documents.domains
    counts: dict[str, Counts] = {}
    for key, value in values.items():
        totals = np.zeros(len(SPLITS) * len(names), np.int64)
        np.add.at(totals, cell, value)
        by_split = zip(SPLITS, totals.reshape(len(SPLITS), -1).tolist(), strict=True)
        counts[key] = {split: dict(zip(names, row, strict=True)) for split, row in by_split}
    return counts


def _file_facts(folder: Path, written: dict[str, WrittenSplit]) -> dict[str, dict[str, Any]]:
    rows = {name: count for w in written.values() for name, count in w.shards.items()}
    files = sorted(folder.iterdir())
    return {f.name: {"rows": rows.get(f.name, 0), "size": f.stat().st_size, "sha256": sha256(f)} for f in files}
