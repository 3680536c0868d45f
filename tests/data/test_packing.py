import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opus_jax.data.packing import fill_rows, lay_out, segments_per_row

BOS, EOS, PAD = 10**6, 10**6 + 1, 10**6 + 2
LENGTHS = st.lists(st.integers(0, 90), max_size=30)
ROW = st.sampled_from([8, 9, 16, 32])


def rows_of(lengths, row_tokens):
    tokens = np.arange(sum(lengths), dtype=np.int32)
    offsets = (np.cumsum(lengths) - lengths).astype(np.int64)
    ids = np.arange(len(lengths)) + 50
    layout = lay_out(lengths, row_tokens)
    # In blocks, as the writer asks for them.
    blocks = [
        fill_rows(layout, tokens, offsets, ids, row_tokens, first, min(3, layout.rows - first), (BOS, EOS, PAD))
        for first in range(0, layout.rows, 3)
    ]
    return layout, np.concatenate(blocks) if blocks else np.zeros(0)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, row_tokens=ROW)
def test_every_token_comes_exactly_once_and_in_order(lengths, row_tokens):
    _, records = rows_of(lengths, row_tokens)
    found = {i + 50: [] for i in range(len(lengths))}
    ended = []
    for record in records:
        for place in range(record["segment_ids"].max()):
            segment = record["tokens"][record["segment_ids"] == place + 1].tolist()
            document = record["document_ids"][place]
            assert segment[0] == BOS
            assert document not in ended
            if segment[-1] == EOS:
                ended.append(document)
            found[document] += [t for t in segment if t < BOS]
    assert sorted(ended) == sorted(found)
    expected = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    assert list(found.values()) == [e.tolist() for e in expected[: len(lengths)]]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, row_tokens=ROW)
def test_targets_are_all_tokens_and_eos_but_never_bos_or_padding(lengths, row_tokens):
    layout, records = rows_of(lengths, row_tokens)
    targets = [r["tokens"][r["loss_mask"] == 1] for r in records]
    flat = np.concatenate(targets) if targets else np.zeros(0, int)
    assert np.array_equal(np.sort(flat[flat < BOS]), np.arange(sum(lengths)))
    assert (flat == EOS).sum() == len(lengths)
    assert not np.isin(flat, [BOS, PAD]).any()
    for record in records:
        assert record["loss_mask"][0] == 0
        padding = record["segment_ids"] == 0
        assert (record["tokens"][padding] == PAD).all()
        assert not padding[: (~padding).sum()].any()  # padding is at the end only
        assert (record["document_ids"] >= 0).sum() == record["segment_ids"].max() <= segments_per_row(row_tokens)
    assert layout.tokens == sum((r["segment_ids"] != 0).sum() for r in records)


def test_long_documents_leave_little_padding():
    lengths = np.random.default_rng(0).integers(1, 2000, 400)
    layout = lay_out(lengths, 256)
    assert layout.tokens / (layout.rows * 256) > 0.99


def test_no_short_piece_of_a_long_document_is_squeezed_into_a_row_end():
    layout = lay_out([55, 100], 64)  # 57 places used, 7 left
    assert layout.row.tolist() == [0, 1, 2]
    layout = lay_out([54, 100], 64)  # 8 left
    assert layout.length.tolist() == [54, 7, 63, 30]
    layout = lay_out([58, 2], 64)  # 4 left, and the whole document fits there
    assert layout.row.tolist() == [0, 0]


def test_many_tiny_documents_keep_to_the_limit_of_segments():
    layout = lay_out([1] * 100, 64)
    assert np.bincount(layout.row).max() == segments_per_row(64) == 8


@pytest.mark.parametrize("lengths", [[], [0], [0, 5]])
def test_nothing_and_empty_documents(lengths):
    layout, records = rows_of(lengths, 16)
    assert layout.rows == len(records) == bool(lengths)
    if lengths:
        assert (records["tokens"] == EOS).sum() == len(lengths)
