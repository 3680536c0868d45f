"""fault_soak: a run that is ended again and again is found exact, and one that lost or doubled a batch is found out."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.fault_soak import MUST_BE_ZERO, soak
from benchmarks.faults.disturbed import Compared, Run
from benchmarks.faults.small_run import configuration


@pytest.mark.slow
def test_a_short_soak_loses_nothing() -> None:
    setting, figures = soak(minutes=0.5, processes=1, seed=1)
    assert setting["runs"] == 1
    assert figures["kills"][0] >= 1
    assert figures["exact_resumes"] == figures["kills"]
    assert {key: sum(figures[key]) for key in MUST_BE_ZERO} == dict.fromkeys(MUST_BE_ZERO, 0.0)


def _finished(root: Path, name: str, rows: list[tuple[int, int]], digest: str) -> Run:
    """A run folder with the selection log [(step, example id)] of rows that were all chosen."""
    run = Run(configuration(root, name), root, 1)
    (run.folder / "selection").mkdir(parents=True)
    columns: dict[str, Any] = {
        "step": [step for step, _ in rows],
        "position": list(range(len(rows))),
        "example_id": [example for _, example in rows],
        "selected": [True] * len(rows),
    }
    pq.write_table(pa.table(columns), run.folder / "selection" / "part-000000001-000000003.parquet")
    (run.folder / "summary.json").write_text(json.dumps({"loss_digest": digest, "batch_digest": digest}))
    return run


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(1, 4), (1, 7), (2, 5), (3, 6)], Compared(lost=0, doubled=0, exact=True)),
        ([(1, 4), (1, 7), (3, 6)], Compared(lost=1, doubled=0, exact=True)),
        ([(1, 4), (1, 7), (2, 5), (2, 5), (3, 6)], Compared(lost=0, doubled=1, exact=True)),
        ([(1, 4), (1, 7), (2, 8), (3, 6)], Compared(lost=1, doubled=0, exact=True)),
    ],
)
def test_a_lost_and_a_doubled_batch_are_found_out(tmp_path: Path, rows: list[tuple[int, int]], found: Compared) -> None:
    whole = _finished(tmp_path, "whole", [(1, 4), (1, 7), (2, 5), (3, 6)], "d")
    assert _finished(tmp_path, "ours", rows, "d").compare(whole) == found


def test_another_digest_is_found_out(tmp_path: Path) -> None:
    whole, ours = (_finished(tmp_path, name, [(1, 4)], name) for name in ("whole", "ours"))
    assert not ours.compare(whole).exact
