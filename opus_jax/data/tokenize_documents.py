"""Tokenizing many texts over several processes, in order, into one flat file."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from jaxtyping import Int

from opus_jax.data.blocks import blocks
from opus_jax.data.tokenizer import Tokenizer, load_tokenizer
from opus_jax.errors import UserError

_BATCH_CHARACTERS = 200_000

Encoded = tuple[np.ndarray, np.ndarray]  # tokens of some texts end to end, and how many each text has


def tokenize_texts(
    texts: Iterable[str],
    tokenizer_folder: Path,
    workers: int,
    spool: Path,
) -> Int[np.ndarray, " documents"]:
    """Write the int32 tokens of all texts end to end into the file `spool`; return how many each text has.

    The file does not depend on the number of workers. One worker means this process.

    Raises:
      UserError: the worker processes died.
    """
    lengths: list[np.ndarray] = [np.zeros(0, np.int64)]
    with spool.open("wb") as file:
        for tokens, counts in _encoded(blocks(texts, len, _BATCH_CHARACTERS), tokenizer_folder, workers):
            file.write(tokens.tobytes())
            lengths.append(counts)
    return np.concatenate(lengths)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoded(batches: Iterator[list[str]], folder: Path, workers: int) -> Iterator[Encoded]:
    if workers == 1:
        tokenizer = load_tokenizer(folder)
        for batch in batches:
            yield encode_texts(tokenizer, batch)
        return
    # Not fork: JAX may be loaded here, and its threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (str(folder),)) as pool:
            yield from _in_order(pool, batches, 3 * workers)
    except BrokenProcessPool:
        raise UserError(
            "the processes that tokenize died (out of memory, or a script without `if __name__ == '__main__':`): "
            "set corpus.workers=1"
        ) from None


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[list[str]], ahead: int) -> Iterator[Encoded]:
    """Results in the order of the batches; at most `ahead` batches are under way, which bounds memory."""
    waiting: deque[Future[Encoded]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_encode_in_worker, batch))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """The int32 tokens of some texts end to end, and how many each text has."""
    ids = [tokenizer.encode(text) for text in texts]
    counts = np.array([len(i) for i in ids], np.int64)
    return np.fromiter((token for i in ids for token in i), np.int32, int(counts.sum())), counts


_worker_tokenizer: list[Tokenizer] = []


def _start_worker(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer.append(load_tokenizer(folder))


def _end_with_parent() -> None:
    """A killed parent would leave workers waiting for ever: they hold both ends of their queue."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return encode_texts(_worker_tokenizer[0], texts)
