"""The folder of scores, and its parts while scoring goes on.

    settings.json       what decides the scores; another value is refused
    parts/              what was scored so far, by segment; gone when all is done
    rows-*.parquet      example_id, domain, utility, z, target_tokens, document_ids
    documents.parquet   document_id, source, domain, utility, tokens, rows, noise, standard_error
    scores.json         written when all of these are there: the settings, and how the utilities are spread
    roc.json            where some documents are known to be corrupted

Every file appears whole or not at all, so whatever is there after a kill is good.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Shaped

from opus_jax.config import dotted
from opus_jax.distributed.agreement import same_fate
from opus_jax.errors import UserError
from opus_jax.training.atomic import remove_partial_files, write_atomic
from opus_jax.training.run_lock import NAME as LOCK
from opus_jax.training.run_lock import run_lock
from opus_jax.training.strict_json import encode

SETTINGS, PARTS, SCORES = "settings.json", "parts", "scores.json"

PART_SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("domain_id", pa.int32()),
        ("sums", pa.list_(pa.float32())),  # of the target tokens' utilities, by segment
        ("targets", pa.list_(pa.int32())),
        ("document_ids", pa.list_(pa.int64())),
    ]
)


@contextmanager
def open_scores(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Make the folder if needed, hold it for this command, and note the settings. Only process 0 of several writes.

    Raises:
      UserError: the folder cannot be written, another process holds it, or holds scores of other settings.
    """
    with ExitStack() as held:
        with same_fate():
            if jax.process_index() == 0:
                held.enter_context(_opened(folder, settings))
        yield


@contextmanager
def _opened(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise _not_writable(folder, error) from None
    with _lock(folder):
        _refuse_changed(folder, settings)
        for inside in (folder, folder / PARTS):
            remove_partial_files(inside)
        write_file(folder / SETTINGS, encode(settings, indent=1) + "\n")
        yield


def finished(folder: Path) -> dict[str, Any] | None:
    """scores.json, or None while there is something left to score."""
    file = folder / SCORES
    return json.loads(file.read_text()) if file.is_file() else None


def part_files(folder: Path) -> list[Path]:
    """In the order of their rows."""
    return sorted((folder / PARTS).glob("part-*.parquet"))


def part_file(folder: Path, first_row: int) -> Path:
    return folder / PARTS / f"part-{first_row:012d}.parquet"


def write_part(file: Path, records: Shaped[np.ndarray, " R"], sums: Float[np.ndarray, "R S"]) -> None:
    """What was scored of some rows.

    Args:
      records: as read from the corpus.
      sums: the utility of every segment, summed over its target tokens.
    """
    present = records["document_ids"] >= 0
    table = pa.table(
        [
            pa.array(records["example_id"]),
            pa.array(records["domain_id"]),
            _lists(sums, present),
            _lists(_segment_targets(records, sums.shape[1]), present),
            _lists(records["document_ids"], present),
        ],
        schema=PART_SCHEMA,
    )
    write_table(file, table)


def remove_parts(folder: Path) -> None:
    for part in part_files(folder):
        part.unlink()
    (folder / PARTS).rmdir()


def _segment_targets(records: Shaped[np.ndarray, " R"], segments: int) -> Shaped[np.ndarray, "R S"]:
    """int32[R, S]: target tokens of every segment; a row's first token is none."""
    mask = records["loss_mask"].astype(np.int32)
    mask[:, 0] = 0
    counts = np.zeros((len(records), segments + 1), np.int32)
    np.add.at(counts, (np.arange(len(records))[:, None], records["segment_ids"]), mask)
    return counts[:, 1:]


def _lists(values: Shaped[np.ndarray, "R S"], present: Shaped[np.ndarray, "R S"]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values[present])))


# ------------------------------------------------------------------------------------------------- writing


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        hold = run_lock(folder)
        hold.__enter__()
    except UserError:
        raise UserError(
            f"another process is writing scores to {folder}: wait for it, or choose another --output"
        ) from None
    try:
        yield
    finally:
        hold.__exit__(None, None, None)


def _refuse_changed(folder: Path, settings: dict[str, Any]) -> None:
    """A mistake that ended before anything was scored binds nobody."""
    file, begun = folder / SETTINGS, (folder / SCORES).exists() or bool(part_files(folder))
    if not (begun and file.is_file()):
        return
    old, new = dotted(json.loads(file.read_text())), dotted(json.loads(encode(settings)))
    changed = [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        said = "; ".join(changed)
        raise UserError(f"{folder} holds scores of other settings ({said}): set these back, or choose another --output")


def write_table(file: Path, table: pa.Table) -> None:
    """Raises UserError when the disk is full or not writable."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_file(file, sink.getvalue().to_pybytes())


def write_file(file: Path, content: str | bytes) -> None:
    """Raises UserError when the disk is full or not writable."""
    try:
        write_atomic(file, content)
    except OSError as error:
        raise _not_writable(file.parent, error) from None


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write scores to {folder} ({error.strerror}): make room or choose another --output")
