"""Tokenizing a corpus in shards: tasks that an engine may run on any machine, in any order, any number of times.

A shard is a run of documents. Its task reads them from documents.parquet and writes their tokens into a file of its
own, which appears whole or not at all, and whose content depends on nothing but the documents and the tokenizer. So a
task that runs twice, because the machine of the first attempt was lost, changes nothing, and what is there is not done
again.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Int
from rich.progress import Progress

from opus_jax.config import fingerprint
from opus_jax.data.blocks import blocks
from opus_jax.data.documents_table import read_columns
from opus_jax.data.records import DOCUMENTS_FILE, sha256
from opus_jax.data.tokenize_documents import encode_texts
from opus_jax.data.tokenizer import Tokenizer, load_tokenizer
from opus_jax.errors import UserError

SHARD_BYTES = 4_000_000  # of text: seconds of work


@dataclass(frozen=True)
class ShardTask:
    """Documents first .. last - 1 of the table in `folder`, beside their tokenizer, into the file `output`."""

    folder: str
    tokenizer_hash: str
    first: int
    last: int
    output: str


# Runs the tasks, each at least once, and yields once for every task that is done.
Engine = Callable[[Callable[[ShardTask], None], list[ShardTask]], Iterator[None]]


def kept_tokens(records: Path, mark: str) -> Path:
    """Where the shards of the preparation `mark` stay until it has succeeded."""
    return records / f".tokens-{mark}"


def tokenize_shards(
    folder: Path, kept: Path, spool: Path, engine: Engine, bar: Progress
) -> Int[np.ndarray, " documents"]:
    """Write the int32 tokens of all documents end to end into the file `spool`; return how many each document has.

    The same file, byte for byte, as `tokenize_texts` writes.

    Args:
      folder: documents.parquet and the tokenizer; the engine's workers read it.
      kept: the shards' files; the engine's workers write them. Those of an earlier attempt are used.

    Raises:
      UserError: the workers wrote files that this process does not see.
    """
    tokenizer = load_tokenizer(folder).hash
    place = kept / fingerprint(sha256(folder / DOCUMENTS_FILE), tokenizer)
    place.mkdir(parents=True, exist_ok=True)
    tasks = list(_tasks(folder, tokenizer, place))
    missing = _missing(tasks)
    for _ in bar.track(engine(tokenize_shard, missing), total=len(missing), description="tokenizing shards"):
        pass
    if lost := _missing(tasks):
        raise UserError(
            f"{lost[0].output} was written on another machine and is not seen here: set corpus.cache_dir to storage "
            "that all machines of the cluster share"
        )
    return _join(tasks, spool)


def tokenize_shard(task: ShardTask) -> None:
    """One task.

    Raises:
      UserError: the documents or their tokenizer cannot be read here.
    """
    tokens, counts = encode_texts(_tokenizer(task.folder, task.tokenizer_hash), list(_texts(task)))
    output = Path(task.output)
    partial = output.with_name(f".{output.name}-{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            np.savez(file, tokens=tokens, counts=counts)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def _tasks(folder: Path, tokenizer: str, place: Path) -> Iterator[ShardTask]:
    sizes = read_columns(folder, "bytes")["bytes"]
    first = 0
    for number, block in enumerate(blocks(sizes, int, SHARD_BYTES)):
        last = first + len(block)
        yield ShardTask(str(folder), tokenizer, first, last, str(place / f"{number:06d}.npz"))
        first = last


def _missing(tasks: Iterable[ShardTask]) -> list[ShardTask]:
    return [task for task in tasks if not Path(task.output).exists()]


@lru_cache(maxsize=1)
def _tokenizer(folder: str, expected: str) -> Tokenizer:
    """Loaded once by a worker, for all shards of a corpus."""
    found = load_tokenizer(folder)
    if found.hash != expected:
        raise UserError(f"{folder} holds the tokenizer {found.hash}, not {expected}: prepare again")
    return found


def _texts(task: ShardTask) -> Iterator[str]:
    """Only the row groups in which the shard lies are read."""
    try:
        table = pq.ParquetFile(Path(task.folder) / DOCUMENTS_FILE)
    except OSError as error:
        raise UserError(
            f"a worker cannot read {task.folder} ({error}): set corpus.cache_dir to shared storage"
        ) from None
    with table:
        begin = 0
        for group in range(table.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            low, high = max(task.first, begin), min(task.last, end)
            if low < high:
                column = table.read_row_group(group, columns=["text"])["text"]
                yield from column.slice(low - begin, high - low).to_pylist()
            begin = end


def _join(tasks: list[ShardTask], spool: Path) -> Int[np.ndarray, " documents"]:
    counts: list[np.ndarray] = [np.zeros(0, np.int64)]
    with spool.open("wb") as file:
        for task in tasks:
            with np.load(task.output, allow_pickle=False) as shard:
                file.write(shard["tokens"].tobytes())
                counts.append(shard["counts"])
    return np.concatenate(counts)
