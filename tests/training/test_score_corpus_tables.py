"""What is worked out from scored segments: documents over several rows, standard scores, areas under the curve."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opus_jax.data.packing import record_dtype
from opus_jax.errors import UserError
from opus_jax.training import score_tables
from opus_jax.training.score_files import PARTS, SETTINGS, finished, open_scores, part_file, write_part
from opus_jax.training.score_roc import area_under_curve, document_roc, standard_error
from opus_jax.training.score_tables import DOCUMENT_SCHEMA, _Documents, finish


def records_of(rows: list[list[tuple[int, int]]], first: int = 0) -> np.ndarray:
    """Rows of 16 tokens with (document, target tokens) segments; each begins with a BOS."""
    records = np.zeros(len(rows), record_dtype(16, 3))
    records["example_id"], records["document_ids"] = first + np.arange(len(rows)), -1
    for record, segments in zip(records, rows, strict=True):
        column = 0
        for place, (document, targets) in enumerate(segments):
            record["document_ids"][place] = document
            record["segment_ids"][column : column + targets + 1] = place + 1
            record["loss_mask"][column + 1 : column + targets + 1] = 1
            column += targets + 1
    return records


class Corpus:
    """A manifest's and a documents table's worth of three documents, one of them in another split."""

    domains: ClassVar = ["web"]

    def total_documents(self) -> int:
        return 4

    def columns(self, *_: Any) -> dict[str, list]:
        return {
            "document_id": [0, 1, 2, 3],
            "domain_id": [0, 0, 0, 0],
            "split": ["train", "proxy", "train", "train"],
            "source": ["a", "b", "c", "d"],
            "noise": [None, None, "shuffle", None],
        }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two parts: document 0 lies in three rows, document 2 in one, document 3 in none."""
    monkeypatch.setattr(score_tables.Manifest, "load", lambda _: Corpus())
    monkeypatch.setattr(score_tables, "read_columns", Corpus().columns)
    with open_scores(tmp_path, {}):
        sums = np.array([[6, 0, 0], [4, -3, 0]], np.float32)
        write_part(part_file(tmp_path, 0), records_of([[(0, 3)], [(0, 4), (2, 5)]]), sums)
        write_part(part_file(tmp_path, 2), records_of([[(0, 2)]], 2), np.array([[-1, 0, 0]], np.float32))
    return tmp_path


def test_rows_have_means_over_their_target_tokens_and_standard_scores(folder: Path) -> None:
    found = finish(folder, folder, "train", {"asked": 1})
    rows = [line for file in sorted(folder.glob("rows-*")) for line in pq.read_table(file).to_pylist()]
    utilities = np.array([6 / 3, 1 / 9, -1 / 2])
    assert [line["utility"] for line in rows] == pytest.approx(list(utilities))
    assert [line["z"] for line in rows] == pytest.approx(list((utilities - utilities.mean()) / utilities.std()))
    assert [line["target_tokens"] for line in rows] == [3, 9, 2]
    assert [line["document_ids"] for line in rows] == [[0], [0, 2], [0]]
    assert [line["example_id"] for line in rows] == [0, 1, 2]
    assert finished(folder) == found
    assert found["asked"] == 1
    assert (found["rows"], found["documents"], found["target_tokens"]) == (3, 2, 14)
    assert (found["utility_mean"], found["utility_sd"]) == pytest.approx((utilities.mean(), utilities.std()))


def test_documents_gather_their_segments_from_all_rows_and_parts(folder: Path) -> None:
    finish(folder, folder, "train", {})
    first, second = pq.read_table(folder / "documents.parquet").to_pylist()
    assert first["utility"] == pytest.approx((6 + 4 - 1) / 9)
    assert (first["document_id"], first["source"], first["domain"], first["tokens"]) == (0, "a", "web", 9)
    assert (first["rows"], first["noise"]) == (3, None)
    residuals = np.array([6 - 3, 4 - 4, -1 - 2])  # a mean of 1 times 3, 4 and 2 tokens
    assert first["standard_error"] == pytest.approx(np.sqrt(3 / 2 * (residuals**2).sum()) / 9)
    assert second["utility"] == pytest.approx(-3 / 5)
    assert (second["source"], second["rows"], second["noise"], second["standard_error"]) == ("c", 1, "shuffle", None)


def test_a_standard_error_is_the_spread_over_corpora_made_alike() -> None:
    """Many documents with segments of the same law: the mean estimate of the error is the spread of the utilities."""
    random = np.random.default_rng(0)
    documents, segments = 4000, 12
    tokens = random.integers(5, 30, (documents, segments))
    sums = tokens * 0.3 + random.normal(0, 1, tokens.shape) * np.sqrt(tokens)
    table = _Documents(documents)
    table.add(np.repeat(np.arange(documents), segments), sums.ravel(), tokens.ravel())
    assert np.sqrt(np.mean(table.standard_error() ** 2)) == pytest.approx(table.utility().std(), rel=0.05)


def test_a_row_that_is_not_finite_is_counted_and_spoils_no_other(folder: Path) -> None:
    sums = np.array([[np.nan, 0, 0]], np.float32)
    write_part(part_file(folder, 3), records_of([[(3, 4)]], 3), sums)
    found = finish(folder, folder, "train", {})
    assert found["rows_not_finite"] == 1
    assert np.isfinite(found["utility_mean"])
    assert np.isnan(pq.read_table(folder / "rows-000002.parquet")["z"].to_numpy()).all()
    assert np.isfinite(pq.read_table(folder / "rows-000000.parquet")["z"].to_numpy()).all()


# ---------------------------------------------------------------------------------------------- the folder


def test_settings_bind_once_something_is_scored(tmp_path: Path) -> None:
    with open_scores(tmp_path, {"run": {"step": 1}}):
        pass
    with open_scores(tmp_path, {"run": {"step": 2}}):
        write_part(part_file(tmp_path, 0), records_of([[(0, 3)]]), np.ones((1, 3), np.float32))
    said = r"run.step: 2 -> 3; split: absent -> train"
    with pytest.raises(UserError, match=said), open_scores(tmp_path, {"run": {"step": 3}, "split": "train"}):
        pass
    assert '"step": 2' in (tmp_path / SETTINGS).read_text()


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(folder: Path) -> None:
    parts = sorted((folder / PARTS).iterdir())
    (folder / PARTS / ".partial-x").write_text("torn")
    (folder / ".partial-y").write_text("torn")
    with open_scores(folder, {}):
        assert sorted((folder / PARTS).iterdir()) == parts
        assert not list(folder.glob(".partial-*"))


# ------------------------------------------------------------------------------------------------- the curve


def documents(tmp_path: Path, lines: list[tuple[str, float, str | None]]) -> Path:
    columns = {name: [None] * len(lines) for name in DOCUMENT_SCHEMA.names}
    columns |= {name: [line[i] for line in lines] for i, name in enumerate(("domain", "utility", "noise"))}
    pq.write_table(pa.table(columns, schema=DOCUMENT_SCHEMA), tmp_path / "documents.parquet")
    return tmp_path / "documents.parquet"


def test_an_area_counts_pairs_and_half_of_the_ties() -> None:
    random = np.random.default_rng(1)
    bad, good = random.integers(0, 6, 40).astype(float), random.integers(2, 9, 60).astype(float)
    pairs = np.sign(good[None] - bad[:, None])
    assert area_under_curve(bad, good) == pytest.approx(((pairs + 1) / 2).mean())
    assert area_under_curve(np.zeros(3), np.ones(4)) == 1
    assert area_under_curve(np.ones(3), np.ones(4)) == 0.5


def test_the_standard_error_of_an_area_is_its_spread_over_samples() -> None:
    random = np.random.default_rng(2)
    areas = [area_under_curve(random.normal(-1, 1, 40), random.normal(0, 1, 60)) for _ in range(2000)]
    assert standard_error(float(np.mean(areas)), 40, 60) == pytest.approx(np.std(areas), rel=0.1)


def test_areas_overall_by_transform_and_within_domains(tmp_path: Path) -> None:
    """Noise is in the domain that is worth less anyway: overall areas flatter, areas within domains do not."""
    lines = [("good", 10.0, None), ("good", 11.0, None), ("poor", 1.0, None), ("poor", 3.0, None)]
    lines += [("poor", 2.0, "shuffle"), ("poor", 0.0, "characters"), ("poor", float("nan"), "shuffle")]
    roc = document_roc(documents(tmp_path, lines))
    assert roc is not None
    assert roc["auc"] == pytest.approx((3 + 4) / 8)
    assert roc["auc_within_domains"] == pytest.approx((1 + 2) / 4)
    assert {name: found["auc"] for name, found in roc["transforms"].items()} == {"characters": 1.0, "shuffle": 0.75}
    assert (roc["corrupted"], roc["clean"], roc["transforms"]["shuffle"]["corrupted"]) == (2, 4, 1)


def test_the_curve_goes_from_nothing_to_everything_and_has_the_area(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    lines = [("d", float(x), "shuffle") for x in random.normal(-1, 1, 300)]
    lines += [("d", float(x), None) for x in random.normal(0, 1, 400)]
    roc = document_roc(documents(tmp_path, lines))
    assert roc is not None
    lost, caught = np.array(roc["curve"]).T
    assert (lost[0], lost[-1], caught[-1]) == (0, 1, 1)
    assert (np.diff(lost) >= 0).all()
    assert (np.diff(caught) >= 0).all()
    assert np.trapezoid(caught, lost) == pytest.approx(roc["auc"], abs=0.01)


def test_planted_domains_count_as_corrupted(tmp_path: Path) -> None:
    file = documents(tmp_path, [("toxic", 0.0, None), ("toxic", 2.0, None), ("web", 1.0, None), ("web", 3.0, None)])
    assert document_roc(file) is None, "nothing is known to be bad"
    roc = document_roc(file, ("toxic",))
    assert roc is not None
    assert (roc["auc"], roc["auc_within_domains"]) == (0.75, None)
    assert list(roc["transforms"]) == ["domain toxic"]
    assert document_roc(file, ("toxic", "web")) is None, "nothing is known to be good"
    with pytest.raises(UserError, match="--planted tixic: there are documents of toxic, web"):
        document_roc(file, ("tixic",))
