import json
import shutil
from pathlib import Path

import pytest
from fabricate import HOSTILE

from opus_jax.data.documents_table import read_columns
from opus_jax.data.records import RowReader
from opus_jax.errors import UserError
from opus_jax.reports.corpus import manifest_of, records_folder
from opus_jax.reports.decisions import StoppedDocument
from opus_jax.reports.examples import read_examples, read_excerpts
from opus_jax.reports.selection_reader import Extreme


def extreme(example: int) -> Extreme:
    return Extreme(step=11, example_id=example, domain_id=0, utility=1.0, z=2.0, selected=True)


def test_texts_are_those_of_the_documents(trained: Path) -> None:
    """Every segment of every row is a part of the document whose source it names, and they are whole together."""
    records = records_folder(trained)
    rows = len(RowReader(records, "train"))
    columns = read_columns(records, "split", "source", "licence", "text")
    documents = {s: (t, licence) for p, s, licence, t in zip(*columns.values(), strict=True) if p == "train"}
    pieces: dict[str, str] = {}
    for example in read_examples(records, [extreme(i) for i in range(rows)]):
        for segment in example.segments:
            assert segment.licence == documents[segment.source][1]
            pieces[segment.source] = pieces.get(segment.source, "") + segment.text
    # A character cut in two by the end of a row shows as U+FFFD on both sides.
    whole = {source: text for source, text in pieces.items() if "\ufffd" not in text}
    assert len(whole) > 100
    assert pieces.keys() == documents.keys()
    assert all(documents[source][0] == text for source, text in whole.items())
    assert any(HOSTILE["prose"] in text for text in whole.values())


def test_no_row_asked_for(trained: Path) -> None:
    assert read_examples(records_folder(trained), []) == []


def test_another_corpus_in_the_same_place_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "records.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "other"}))
    assert manifest_of(tmp_path / "run") is None
    with pytest.raises(UserError, match="now holds another corpus"):
        records_folder(tmp_path / "run")
    file.unlink()
    with pytest.raises(UserError, match=r"records\.json is absent"):
        records_folder(tmp_path / "run")


def test_excerpts_are_the_beginnings_of_documents(trained: Path) -> None:
    records = records_folder(trained)
    columns = read_columns(records, "document_id", "source", "text")
    wanted = [StoppedDocument(columns["document_id"][i], "prose", 0.1) for i in (7, 3)]
    absent = StoppedDocument(10**6, "prose", 0.0)
    found = read_excerpts(records, [wanted[0], absent, wanted[1]], characters=20)
    assert [excerpt.stopped for excerpt in found] == wanted
    assert [excerpt.segment.text for excerpt in found] == [f"{columns['text'][i][:20]} …" for i in (7, 3)]
    assert [excerpt.segment.source for excerpt in found] == [columns["source"][i] for i in (7, 3)]
    assert read_excerpts(records, wanted[:1], characters=10**4)[0].segment.text == columns["text"][7]
    assert read_excerpts(records, []) == []
