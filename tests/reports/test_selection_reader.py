from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fabricate import log_table

from opus_jax.errors import UserError
from opus_jax.reports import selection_reader
from opus_jax.reports.selection_reader import Z_EDGES, SelectionReader

STEPS, N, G = 43, 12, 3


@pytest.fixture
def log(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A log of random rows in several parts, and its columns."""
    rng = np.random.default_rng(1)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("step", "example", "domain", "z", "selected")}
    for first, last in ((1, 9), (10, 10), (11, STEPS)):
        tables = []
        for step in range(first, last + 1):
            rows = (
                rng.integers(0, 40, N),
                rng.integers(0, G, N),
                2 * rng.normal(size=N).astype(np.float32),
                rng.random(N) < 0.5,
            )
            tables.append(log_table(step, rows[0], rows[1], 10 * rows[2], rows[2], rows[3]))
            for name, column in zip(columns, (np.full(N, step), *rows), strict=True):
                columns[name].append(column)
        with pq.ParquetWriter(tmp_path / f"part-{first:09d}-{last:09d}.parquet", tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    return tmp_path, {name: np.concatenate(parts) for name, parts in columns.items()}


@pytest.mark.parametrize("batch_rows", [5, 1 << 17])
def test_counts_agree_with_loops(log: tuple, batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_reader, "_BATCH_ROWS", batch_rows)
    folder, rows = log
    summary = SelectionReader(folder).summarise(G, STEPS, first_scored=4, periods=7)
    edges = summary.edges
    assert (edges[0], edges[-1], len(edges)) == (1, STEPS + 1, 8)
    for p in range(7):
        inside = (rows["step"] >= edges[p]) & (rows["step"] < edges[p + 1])
        for g in range(G):
            here = inside & (rows["domain"] == g)
            assert summary.offered[p, g] == here.sum()
            assert summary.selected[p, g] == (here & rows["selected"]).sum()
            scored = np.clip(rows["z"][here & (rows["step"] >= 4)], -4, 3.999)
            assert summary.z_counts[p, g].tolist() == np.histogram(scored, Z_EDGES)[0].tolist()


@pytest.mark.parametrize("batch_rows", [5, 1 << 17])
def test_extremes_are_the_best_of_each_example(log: tuple, batch_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_reader, "_BATCH_ROWS", batch_rows)
    folder, rows = log
    summary = SelectionReader(folder).summarise(G, STEPS, first_scored=4, extremes=6)
    scored = rows["step"] >= 4
    examples = np.unique(rows["example"][scored])
    best = {int(e): rows["z"][scored & (rows["example"] == e)].max() for e in examples}
    worst = {int(e): rows["z"][scored & (rows["example"] == e)].min() for e in examples}
    assert [x.example_id for x in summary.highest] == sorted(best, key=lambda e: -best[e])[:6]
    assert [x.example_id for x in summary.lowest] == sorted(worst, key=worst.__getitem__)[:6]
    top = summary.highest[0]
    place = np.flatnonzero(
        (rows["step"] == top.step) & (rows["example"] == top.example_id) & (rows["z"] == np.float32(top.z))
    )[0]
    assert top.example_id == rows["example"][place]
    assert (top.domain_id, top.selected) == (rows["domain"][place], rows["selected"][place])
    assert top.utility == pytest.approx(10 * top.z, rel=1e-6)


def test_proxy_rows_are_counted_but_are_no_extremes(log: tuple) -> None:
    every = SelectionReader(log[0]).summarise(G, STEPS, first_scored=1, extremes=40)
    training = SelectionReader(log[0]).summarise(G, STEPS, first_scored=1, extremes=40, training_rows=30)
    assert training.offered.tolist() == every.offered.tolist()
    assert training.z_counts.tolist() == every.z_counts.tolist()
    for found, of_all in ((training.highest, every.highest), (training.lowest, every.lowest)):
        assert list(found) == [extreme for extreme in of_all if extreme.example_id < 30]
        assert len(found) < len(of_all)


def test_later_steps_are_left_out(log: tuple) -> None:
    summary = SelectionReader(log[0]).summarise(G, 20, first_scored=None)
    assert summary.offered.sum() == 20 * N
    assert not summary.z_counts.any()
    assert summary.highest == summary.lowest == ()


def test_a_run_without_a_log(tmp_path: Path) -> None:
    reader = SelectionReader(tmp_path / "selection")
    assert not reader.exists


def test_a_damaged_part_is_named(log: tuple) -> None:
    part = log[0] / "part-000000010-000000010.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        SelectionReader(log[0]).summarise(G, STEPS, first_scored=1)
