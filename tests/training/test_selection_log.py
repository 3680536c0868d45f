import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opus_jax.training import selection_log
from opus_jax.training.selection_log import SelectionLog


def candidates(step, n=4):
    rng = np.random.default_rng(step)
    return {
        "example_id": rng.integers(0, 2**40, n),
        "domain_id": rng.integers(0, 3, n).astype(np.int32),
        "utility": rng.normal(size=n).astype(np.float32),
        "z": rng.normal(size=n).astype(np.float32),
        "probability": np.full(n, 1 / n, np.float32),
        "selected": np.arange(n) % 2 == 0,
    }


def fill(folder, steps, flush_at=(), resume_step=0):
    log = SelectionLog(folder, resume_step)
    for step in steps:
        log.write(step, candidates(step))
        if step in flush_at:
            log.flush()
    log.close()


def parts(folder):
    return sorted(file.name for file in (folder / "selection").iterdir())


def rows(folder):
    return pa.concat_tables([pq.read_table(folder / "selection" / name) for name in parts(folder)])


def test_columns_and_values(tmp_path):
    fill(tmp_path, [1, 2])
    table = rows(tmp_path)
    assert table.schema.equals(selection_log.SCHEMA)
    assert table["step"].to_pylist() == [1] * 4 + [2] * 4
    assert table["position"].to_pylist() == [0, 1, 2, 3] * 2
    for name, values in candidates(2).items():
        np.testing.assert_array_equal(table[name].to_numpy()[4:], values)
    assert table["redundancy"].null_count == 8


def test_parts_are_named_by_their_steps(tmp_path):
    fill(tmp_path, range(1, 8), flush_at=(3, 6))
    expected = ["part-000000001-000000003", "part-000000004-000000006", "part-000000007-000000007"]
    assert parts(tmp_path) == [f"{name}.parquet" for name in expected]


@pytest.mark.parametrize("step", range(8))
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, step):
    fill(tmp_path / "whole", range(1, 8))
    fill(tmp_path / "resumed", range(1, 8), flush_at=(3, 6))
    (tmp_path / "resumed" / "selection" / ".partial-zz").write_bytes(b"PAR1")
    fill(tmp_path / "resumed", range(step + 1, 8), resume_step=step)
    assert rows(tmp_path / "resumed").equals(rows(tmp_path / "whole"))
    if step == 5:
        assert "part-000000004-000000005.parquet" in parts(tmp_path / "resumed")


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(selection_log, "_ROWS_PER_PART", 10)
    log = SelectionLog(tmp_path)
    for step in range(1, 5):
        log.write(step, candidates(step))
    assert parts(tmp_path) == ["part-000000001-000000003.parquet"]


def test_a_kill_between_writing_and_removing_leaves_no_double_rows(tmp_path):
    """The part cut at the restored step and the whole one may both be there for a moment."""
    fill(tmp_path, range(1, 5))
    whole = (tmp_path / "selection" / "part-000000001-000000004.parquet").read_bytes()
    selection_log.truncate(tmp_path, 2)
    (tmp_path / "selection" / "part-000000001-000000004.parquet").write_bytes(whole)
    selection_log.truncate(tmp_path, 2)
    assert rows(tmp_path)["step"].to_pylist() == [1] * 4 + [2] * 4


def test_refuses_unknown_and_ragged_columns(tmp_path):
    log = SelectionLog(tmp_path)
    with pytest.raises(ValueError, match="not columns of the selection log: score"):
        log.write(1, candidates(1) | {"score": np.zeros(4)})
    with pytest.raises(ValueError, match="expected length"):
        log.write(1, candidates(1) | {"z": np.zeros(3, np.float32)})
