import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fabricate import HOSTILE, LABELS, small_config
from test_html import ALL_CHARTS, Page

from opus_jax.reports.escape import escape
from opus_jax.reports.html import write_report

PLAN_CHARTS = {"plan-weights", "worth", "passes", "cluster-worth", "cluster-share"}
HEADINGS = ("What the stream offered", "What the stream stopped offering")


@pytest.fixture(scope="module")
def page(planned: Path) -> Page:
    return Page(write_report(planned))


@pytest.fixture
def copied(planned: Path, tmp_path: Path) -> Path:
    shutil.copytree(planned, tmp_path / "run")
    return tmp_path / "run"


def test_every_part_is_there(page: Page) -> None:
    assert page.charts.keys() == ALL_CHARTS | PLAN_CHARTS
    for words in (
        *HEADINGS,
        "The plan changed 6 times; the last one holds after step 70",
        "gets 31 % of the stream. Of 140 documents with scores, 12 get less than a tenth",
        "Clusters that lost most of the stream",
        "-1.00 ± 0.10",
        "now at 2.0 % of its first share",
    ):
        assert words in page.text
    assert page.charts["plan-weights"]["figure"]["data"][0]["x"][0] == 0


def test_a_run_whose_plan_never_changed_shows_nothing_of_it(trained: Path) -> None:
    page = Page(write_report(trained))
    assert page.charts.keys() == ALL_CHARTS
    assert not any(heading in page.text for heading in HEADINGS)


def test_nothing_hostile_becomes_markup(page: Page) -> None:
    assert {tag for tag, _ in page.tags} & {"img", "b", "iframe", "a", "form"} == set()
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert LABELS[1] in page.text
    assert HOSTILE["%{y}<b>bold</b></script>{body}"] in page.text
    assert "2020 [U+202E]" in page.text
    assert "<" not in page.scripts[1]
    assert "\\u202e" not in page.scripts[1]
    for chart in ("cluster-worth", "cluster-share"):
        names = page.charts[chart]["figure"]["layout"]["yaxis"]["ticktext"]
        assert any(name.startswith(escape("</script><img src=x")) for name in names)


def test_documents_are_named_without_their_texts(copied: Path) -> None:
    config = small_config(copied.parent, report={"texts": False})
    config.save(copied / "config.yaml")
    text = Page(write_report(copied)).text
    assert "Their texts are left out, as report.texts = false asks." in text
    assert HOSTILE["%{y}<b>bold</b></script>{body}"] not in text
    assert "Clusters that lost most of the stream" in text


def test_report_examples_is_the_number_of_documents(copied: Path) -> None:
    small_config(copied.parent, report={"examples": 3}).save(copied / "config.yaml")
    assert Page(write_report(copied)).text.count("of its first share") == 3


def test_a_corpus_that_is_gone_is_said(copied: Path) -> None:
    (copied / "records.json").unlink()
    page = Page(write_report(copied))
    assert page.charts["plan-weights"]["figure"]["data"][0]["x"][0] == 20
    assert "get less than a tenth of the share they began with. The texts cannot be shown: " in page.text


def test_proxy_rows_among_the_candidates_leave_the_texts_readable(copied: Path) -> None:
    """Rows of the proxy that the stream offers have ids beyond the training rows."""
    small_config(copied.parent, plan={"proxy_rows_share": 0.1}).save(copied / "config.yaml")
    _make_proxy_rows_of_the_highest(copied / "selection")
    text = Page(write_report(copied)).text
    assert "The texts cannot be shown" not in text
    assert "Rows of the proxy, which this run also trained on, are left out." in text
    assert "Highest utility" in text


def _make_proxy_rows_of_the_highest(folder: Path) -> None:
    for part in folder.iterdir():
        table = pq.read_table(part)
        ids = np.where(table["z"].to_numpy() > 2, 10**6, table["example_id"].to_numpy())
        pq.write_table(table.set_column(2, "example_id", pa.array(ids)), part)
