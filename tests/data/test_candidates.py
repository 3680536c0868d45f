import itertools
import subprocess
import sys

import numpy as np
import pytest
from small_corpus import prepare_small, small_config

from opus_jax.data.buffers import Buffers, every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.data.plan import advance, initial_plan, rows_at
from opus_jax.data.records import Manifest, RowReader
from opus_jax.errors import UserError

N, SEED = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare_small(tmp_path_factory.mktemp("candidates"))


@pytest.fixture(scope="module")
def reader(folder):
    return RowReader(folder, "train")


@pytest.fixture(scope="module")
def plan(folder, tmp_path_factory):
    return initial_plan(Manifest.load(folder), small_config(tmp_path_factory.mktemp("unused")))


def take(stream, count):
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def same(first, second):
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True)
    )


def test_batches_hold_the_rows_of_their_step(reader, plan):
    for step, batch in enumerate(take(CandidateStream(reader, plan, SEED, every_step(N)), 5)):
        rows = rows_at(plan, SEED, step * N, N)
        assert np.array_equal(batch["example_id"], rows)
        for i, row in enumerate(rows):
            record = reader[int(row)]
            assert all(np.array_equal(batch[name][i], record[name]) for name in record)


def test_shapes_and_types_are_those_the_step_expects(reader, plan):
    (batch,) = take(CandidateStream(reader, plan, SEED, every_step(N)), 1)
    shapes = {name: (value.dtype.name, value.shape) for name, value in batch.items()}
    assert shapes == {
        "tokens": ("int32", (N, 64)),
        "segment_ids": ("int32", (N, 64)),
        "loss_mask": ("float32", (N, 64)),
        "example_id": ("int32", (N,)),
        "domain_id": ("int32", (N,)),
        "document_ids": ("int64", (N, 8)),
    }
    assert all(value.flags["C_CONTIGUOUS"] and value.flags["WRITEABLE"] for value in batch.values())


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_that_read_ahead_change_nothing(reader, plan, threads):
    expected = take(CandidateStream(reader, plan, SEED, every_step(N), threads=0), 12)
    assert same(take(CandidateStream(reader, plan, SEED, every_step(N), threads=threads, ahead=7), 12), expected)


def test_a_process_reads_its_own_rows_and_knows_the_ids_of_all(reader, plan):
    """Rows that lie apart, as they do where a host's devices are not neighbours in the mesh."""
    whole = take(CandidateStream(reader, plan, SEED, every_step(N)), 6)
    for p in range(4):
        part = take(CandidateStream(reader, plan, SEED, every_step(N), held=lambda rows, p=p: np.arange(p, rows, 4)), 6)
        for mine, all_rows in zip(part, whole, strict=True):
            for name in ("tokens", "segment_ids", "loss_mask"):
                assert np.array_equal(mine[name], all_rows[name][p::4])
            for name in ("example_id", "domain_id", "document_ids"):
                assert np.array_equal(mine[name], all_rows[name])


def test_a_process_reads_no_record_of_the_others(reader, plan, monkeypatch):
    read, asked = RowReader.read, []
    monkeypatch.setattr(RowReader, "read", lambda self, rows: asked.append(len(rows)) or read(self, rows))
    take(CandidateStream(reader, plan, SEED, every_step(N), held=lambda rows: np.arange(rows // 4), threads=0), 3)
    assert set(asked) == {2}


def test_a_stream_opened_at_a_step_is_the_continuation(reader, plan):
    stream = CandidateStream(reader, plan, SEED, every_step(N))
    for _ in range(4):
        next(stream)
    assert stream.state() == {"step": 4}  # although more lie ready
    rest = take(stream, 5)
    resumed = CandidateStream(reader, plan, SEED, every_step(N), start_step=4)
    assert resumed.step == 4
    assert same(take(resumed, 5), rest)


def test_a_new_plan_is_a_new_stream_from_its_boundary(reader, plan):
    later = advance(plan, 6 * N, weights=np.array([1.0, 0.0, 0.0]))
    stream = CandidateStream(reader, later, SEED, every_step(N), start_step=6)
    assert all((batch["domain_id"] == 0).all() for batch in take(stream, 4))
    with pytest.raises(UserError, match="begins at slot 48"):
        CandidateStream(reader, later, SEED, every_step(N), start_step=5)


def test_it_works_where_nothing_has_parsed_flags(folder, tmp_path):
    """As in a notebook or a plain script."""
    script = f"""
from opus_jax.config import Config
from opus_jax.data.candidates import CandidateStream
from opus_jax.data.buffers import every_step
from opus_jax.data.plan import initial_plan
from opus_jax.data.records import Manifest, RowReader
plan = initial_plan(Manifest.load({str(folder)!r}), Config())
print(next(CandidateStream(RowReader({str(folder)!r}, "train"), plan, 0, every_step(4)))["tokens"].shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(4, 64)"
    assert done.stderr == ""


def test_steps_that_do_not_choose_take_fewer_rows_and_leave_no_gap(reader, plan):
    buffers = Buffers(candidates=8, batch=2, first=3, every=2)
    assert [buffers.rows(step) for step in range(8)] == [2, 2, 2, 8, 2, 8, 2, 8]
    assert [buffers.slots_before(step) for step in range(8)] == [0, 2, 4, 6, 14, 16, 24, 26]
    batches = take(CandidateStream(reader, plan, SEED, buffers), 8)
    ids = np.concatenate([batch["example_id"] for batch in batches])
    assert np.array_equal(ids, rows_at(plan, SEED, 0, 34))


@pytest.mark.parametrize("buffers", [Buffers(12, 4, 5, 3), Buffers(6, 6), Buffers(9, 3, 0, 1), Buffers(9, 3, 40, 7)])
def test_slots_are_the_rows_of_all_earlier_steps(buffers):
    for step in range(60):
        assert buffers.slots_before(step) == sum(buffers.rows(earlier) for earlier in range(step))
