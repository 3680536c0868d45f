"""`opus-jax score`: the utility of every row and document of a corpus under a run's newest checkpoint.

The utility of a target token is <gradient of its loss, v>, with v the direction of `score_direction`: how much a unit
weight of it in the next batch would lower the loss on the proxy, to first order. Rows and documents have means over
their target tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from opus_jax.config import Config
from opus_jax.data.prepare import prepare
from opus_jax.data.progress import progress_bar
from opus_jax.data.records import SPLITS, Manifest, RowReader, batch_of
from opus_jax.distributed.agreement import of_first, same_fate
from opus_jax.distributed.axes import replicated
from opus_jax.errors import UserError
from opus_jax.influence.directional import document_utilities
from opus_jax.models import parameter_subset
from opus_jax.models.loss import token_losses
from opus_jax.models.presets import ModelSpec
from opus_jax.training import score_files, score_tables
from opus_jax.training.build import Parts, build
from opus_jax.training.checkpoint import load_state, require_checkpoint
from opus_jax.training.feed import put_rows, rows_held
from opus_jax.training.score_direction import direction_facts, score_direction
from opus_jax.training.score_roc import document_roc
from opus_jax.training.score_settings import read_settings, with_tokenizer
from opus_jax.training.strict_json import encode

ROC = "roc.json"
ROWS_PER_PART = 4096

SegmentScores = Callable[..., Float[Array, "N S"]]


def score_corpus(
    run_dir: str | Path,
    overrides: tuple[str, ...] = (),
    *,
    split: str = "train",
    output: str | Path | None = None,
    planted: tuple[str, ...] = (),
    relative: bool = False,
    rows_per_part: int = ROWS_PER_PART,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a corpus, or go on with it where an earlier process was stopped: the files come out the same.

    Args:
      run_dir: the run whose newest checkpoint scores.
      overrides: changes to its configuration; see `score_settings`. `corpus.*` names another corpus to score, with
        the run's tokenizer and against the run's proxy.
      split: train | validation | proxy, of the corpus scored.
      output: where the files go (`score_files`); None = `<run>/scores/<split>`.
      planted: domains whose documents are counted as corrupted in roc.json.
      relative: utilities relative to the average row of the run's stream; see `score_direction`.
      rows_per_part: rows scored between two writes.
      progress: show a progress bar on standard error.

    Returns:
      scores.json, with `output` and, where some documents are known to be corrupted, `roc`.

    Raises:
      UserError: there is no checkpoint, the corpus cannot be scored by it, or the folder cannot be written or holds
        scores of other settings.
    """
    run, folder = Path(run_dir), Path(output) if output else Path(run_dir) / "scores" / split
    progress = progress and jax.process_index() == 0
    with same_fate():
        _require(split)
        home, other = read_settings(run, tuple(overrides))
        require_checkpoint(run)
        parts = build(home, progress=progress)
    step, state, _, meta = load_state(run, parts.abstract_state())
    if meta["tokenizer"] != parts.manifest.tokenizer_hash:
        raise UserError(
            f"{run} was trained with tokenizer {meta['tokenizer']}, but its corpus now gives "
            f"{parts.manifest.tokenizer_hash}: restore the corpus, or set tokenizer.path in {run}/config.yaml"
        )
    records = prepare(with_tokenizer(other, home, parts.records), progress=progress) if other else parts.records
    reader = RowReader(records, split)
    if not len(reader):
        raise UserError(f"corpus {reader.manifest.name} has no {split} rows: choose another --split")
    settings = _settings(parts, reader.manifest, split, step, meta, rows_per_part, relative)
    with score_files.open_scores(folder, settings):
        if of_first(lambda: score_files.finished(folder)) is None:
            v, nonfinite = score_direction(parts, state, relative=relative)
            _score(parts, state.params, v, reader, folder, rows_per_part, progress)
            settings |= {"direction_not_finite": nonfinite}
        with same_fate():
            found = _finish(folder, records, split, settings, planted) if jax.process_index() == 0 else None
        return of_first(lambda: found)


def _finish(
    folder: Path, records: Path, split: str, settings: dict[str, Any], planted: tuple[str, ...]
) -> dict[str, Any]:
    """Make tables of the parts, where that is still to be done, and what is returned."""
    scores = score_files.finished(folder)
    if scores is None:
        scores = score_tables.finish(folder, records, split, settings)
    score_files.remove_parts(folder)
    roc = document_roc(folder / score_tables.DOCUMENTS, planted)
    (folder / ROC).unlink(missing_ok=True)
    if roc is not None:
        score_files.write_file(folder / ROC, encode(roc, indent=1) + "\n")
    return scores | {"output": str(folder)} | ({"roc": roc} if roc else {})


def verdict(scores: dict[str, Any]) -> list[str]:
    """What `score_corpus` found, in lines to print."""
    run = scores["run"]
    lines = [f"{scores['output']}: {scores['rows']} rows, {scores['documents']} documents, step {run['step']}"]
    if scores["rows_not_finite"]:
        lines.append(f"{scores['rows_not_finite']} rows have a utility that is not finite")
    if "roc" in scores:
        roc = scores["roc"]
        by_kind = ", ".join(f"{name} {found['auc']:.3f}" for name, found in roc["transforms"].items())
        lines.append(
            f"corrupted documents rank at the bottom: ROC AUC {roc['auc']:.3f} +- {roc['standard_error']:.3f} "
            f"({roc['corrupted']} corrupted, {roc['clean']} clean; {by_kind})"
        )
    return lines


def segment_scorer(spec: ModelSpec, config: Config, mesh: Mesh, segments: int) -> Any:
    """The jitted `scores(params, v, batch) -> [N, S]`; rows are split over the data axes."""
    settings = config.selection

    def score(params: Any, v: Any, batch: dict[str, Array]) -> Float[Array, "N S"]:
        moving, fixed = parameter_subset.split(params, settings.parameters)
        along, _ = parameter_subset.split(v, settings.parameters)
        return document_utilities(
            lambda part, rows: token_losses(spec, parameter_subset.join(part, fixed), rows),
            moving, along, batch, segments=segments, method=settings.derivative, chunk=settings.score_chunk,
        )  # fmt: skip

    return jax.jit(score, out_shardings=replicated(mesh))


def make_segment_scores(parts: Parts, params: Any, v: Any, segments: int) -> SegmentScores:
    """`scores(batch) -> [N, S]`: sums of the tokens' utilities by segment."""
    jitted = segment_scorer(parts.spec, parts.config, parts.mesh, segments)

    def run(batch: dict[str, np.ndarray], rows: int | None = None) -> Float[Array, "N S"]:
        with jax.set_mesh(parts.mesh):
            return jitted(params, v, put_rows(batch, parts.mesh, rows))

    return run


def _score(
    parts: Parts, params: Any, v: Any, reader: RowReader, folder: Path, rows_per_part: int, progress: bool
) -> None:
    """Write the parts that are not there yet: all processes score, process 0 writes."""
    scores = make_segment_scores(parts, params, v, reader.manifest.segments_per_row)
    firsts = range(0, len(reader), rows_per_part)
    missing = set(of_first(lambda: [first for first in firsts if not score_files.part_file(folder, first).exists()]))
    with progress_bar(progress) as bar:
        task = bar.add_task("scoring rows", total=len(reader))
        for first in firsts:
            rows = np.arange(first, min(first + rows_per_part, len(reader)))
            if first in missing:
                sums = _in_batches(scores, reader, rows, parts.config.candidates, parts.mesh)
                if jax.process_index() == 0:
                    score_files.write_part(score_files.part_file(folder, first), reader.read(rows), sums)
            bar.advance(task, len(rows))


def _in_batches(
    scores: SegmentScores, reader: RowReader, rows: Int[np.ndarray, " R"], at_once: int, mesh: Mesh
) -> Float[np.ndarray, "R S"]:
    """All batches are dispatched before any is waited for; the last one is filled up with its last row."""
    places = np.minimum(np.arange(-(-len(rows) // at_once) * at_once), len(rows) - 1).reshape(-1, at_once)
    held = rows_held(mesh, at_once)
    running = [scores(batch_of(reader.read(rows[at[held]])), at_once) for at in places]
    return np.concatenate([np.asarray(x) for x in running])[: len(rows)]


def _settings(
    parts: Parts, scored: Manifest, split: str, step: int, meta: dict[str, Any], rows_per_part: int, relative: bool
) -> dict[str, Any]:
    """All that decides the scores. The losses of all steps stand for the weights."""
    return {
        "run": {"step": step, "losses": meta["totals"]["loss_digest"], "records": meta["records"]},
        "corpus": {"name": scored.name, "records": scored.fingerprint, "split": split},
        "direction": direction_facts(parts, relative) | {"proxy_records": parts.manifest.fingerprint},
        "rows_per_part": rows_per_part,
    }


def _require(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"--split {split}: must be one of {', '.join(SPLITS)}")
