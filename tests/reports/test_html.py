import base64
import hashlib
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricate import HOSTILE, small_config, write_run

from opus_jax.config import ReportConfig
from opus_jax.reports import page as page_markup
from opus_jax.reports.html import write_report
from opus_jax.reports.run import load_run


class Page(HTMLParser):
    """What a browser makes of the page: elements, attributes, headings, and the text outside scripts and styles."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self.headings = "", [""], [""]
        self._inside = ""
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def charts(self) -> dict[str, dict]:
        return {chart["id"]: chart for chart in json.loads(self.scripts[1])}


@pytest.fixture(scope="module")
def page(trained: Path) -> Page:
    return Page(write_report(trained))


ALL_CHARTS = {"target", "loss", "domains", "share", "utility", "utility-time", "preference", "spread", "audit"}
ALL_CHARTS |= {"overhead", "speed", "wait"}


def test_every_part_is_there(page: Page) -> None:
    assert page.charts.keys() == ALL_CHARTS
    assert "3.2 % better" in page.text
    for word in ("Highest utility", "Lowest utility", "licence of prose", "run-random", "prose (target)"):
        assert word in page.text
    assert [trace["name"] for trace in page.charts["target"]["figure"]["data"]] == ["run", "run-random"]
    assert page.charts["loss"]["axes"].keys() == {"update tokens", "seen tokens", "FLOPs", "seconds", "epochs"}


def test_nothing_of_the_corpus_becomes_markup(page: Page) -> None:
    """The texts, sources, licences and domain names of this corpus try to break out in every way they can."""
    assert {tag for tag, _ in page.tags} & {"img", "b", "iframe", "a", "form"} == set()
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for text in (
        HOSTILE["prose"],
        "<img src=x onerror=alert(3)> {{7*7}} ${7*7} %{y} __import__('os')",
        "# ]]> --> <!-- 𝒳 ünïcode",
    ):
        assert text in page.text
    assert "\u2407 [U+202E]abc" in page.text
    assert not re.search("[\x00-\x08\u202a-\u202e]", page.text)


def test_chart_labels_carry_no_markup(page: Page) -> None:
    names = {trace.get("name") for chart in page.charts.values() for trace in chart["figure"]["data"]}
    assert "&lt;img src=x onerror=alert(2)&gt;" in names
    assert not any("<" in name for name in names if name)
    assert "<" not in page.scripts[1]


def test_the_policy_allows_the_two_scripts_and_no_network(page: Page) -> None:
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in page.scripts[2:]}
    assert set(re.search("script-src ([^;]*);", policy)[1].split()) == hashes  # type: ignore[index]
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.tags)


def test_headings_are_nested_and_charts_have_names(page: Page) -> None:
    levels = [int(tag[1]) for tag in page.headings[1:]]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    plots = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(plots) == len(ALL_CHARTS)
    assert all(a["aria-label"] for a in plots)


def test_texts_left_out(trained: Path, tmp_path: Path) -> None:
    for page in (write_report(trained, settings=ReportConfig(texts=False)), without_texts_by_config(trained, tmp_path)):
        text = Page(page).text
        assert "report.texts = false" in text
        assert "clocks were striking" not in text


def without_texts_by_config(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    small_config(tmp_path, report={"texts": False}).save(tmp_path / "run" / "config.yaml")
    return write_report(tmp_path / "run")


def test_report_examples_is_the_number_of_texts(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    small_config(tmp_path, report={"examples": 2}).save(tmp_path / "run" / "config.yaml")
    page = Page(write_report(tmp_path / "run"))
    assert sum(tag == "article" for tag, _ in page.tags) == 4


def test_texts_that_are_gone_are_said(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "records.json").unlink()
    assert "The texts cannot be shown: " in Page(write_report(tmp_path / "run")).text


@pytest.mark.parametrize("method", ["random", "none", "high_loss"])
def test_other_methods(tmp_path: Path, method: str) -> None:
    config = small_config(tmp_path, selection={"method": method, "warm_start_steps": 5})
    page = Page(write_report(write_run(tmp_path / "run", config, ["prose", "code"])))
    assert ("share" in page.charts) == (method != "none")
    assert ("utility" in page.charts) == (method == "high_loss")
    assert ("chosen at random, so they have no utilities" in page.text) == (method == "random")
    assert ("there was nothing to choose" in page.text) == (method == "none")
    if method == "high_loss":
        assert "Loss of rows by domain" in page.text


def test_unfinished_and_unstarted_runs(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    page = Page(write_report(write_run(tmp_path / "half", config, ["prose", "code"], finished=False)))
    assert "Unfinished, 40 of 80 steps" in page.text
    assert "share" in page.charts
    (tmp_path / "new").mkdir()
    config.save(tmp_path / "new" / "config.yaml")
    assert Page(write_report(tmp_path / "new")).charts == {}


def test_several_runs_of_one_name(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    folders = [write_run(tmp_path / seed / "run", config, ["prose"]) for seed in ("one", "two", "three")]
    page = Page(write_report(folders[0], compare=folders[1:]))
    assert [trace["name"] for trace in page.charts["loss"]["figure"]["data"]] == ["one/run", "two/run", "three/run"]


def test_a_long_run_makes_no_larger_page(tmp_path: Path) -> None:
    config = small_config(tmp_path, run={"steps": 3000}, tracking={"selection_log": False})
    folder = write_run(tmp_path / "run", config, ["prose", "code"])
    page = Page(write_report(folder))
    charts = page.charts
    assert load_run(folder).steps == 3000
    assert "There is no selection log" in page.text
    assert max(len(trace["y"]) for chart in charts.values() for trace in chart["figure"]["data"] if "y" in trace) <= 400
    assert len(json.dumps(charts)) < 200_000


def test_json_for_a_script_element() -> None:
    text = page_markup._json({"a": "</script><!-- & \u2028", "b": float("nan")})
    assert json.loads(text) == {"a": "</script><!-- & \u2028", "b": None}
    assert not re.search("[<>&\u2028]", text)
