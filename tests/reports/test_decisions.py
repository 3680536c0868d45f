import json
import math
from pathlib import Path

import pytest
from fabricate import LABELS, write_decisions

from opus_jax.errors import UserError
from opus_jax.reports.decisions import StoppedDocument, read_decisions


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_decisions(tmp_path, ["prose", "code", "logs"], [4, 7])


def test_every_change_in_the_order_of_steps(written: Path) -> None:
    decisions = read_decisions(written)
    assert [d.step for d in decisions] == list(range(20, 80, 10))
    assert [d.utilities_until for d in decisions] == list(range(10, 70, 10))
    last = decisions[-1]
    assert list(last.domains) == ["prose", "code", "logs"]
    assert sum(plan.weight for plan in last.domains.values()) == pytest.approx(1)
    assert last.domains["code"].worth.mean < 0 < last.domains["prose"].worth.mean
    assert (last.scored, last.stopped, last.share_top_tenth) == (140, 12, 0.31)
    assert last.stopped_examples == (StoppedDocument(4, "logs", 0.02), StoppedDocument(7, "logs", 0.02))


def test_clusters(written: Path) -> None:
    clusters = read_decisions(written)[0].clusters
    assert [c.place for c in clusters[:3]] == ["prose 0", "code 0", "prose 1"]
    assert (clusters[1].label, clusters[1].rows, clusters[5].worth.scores) == (LABELS[1], 13, 0)
    assert clusters[0].fall > 0 > clusters[15].fall
    assert sum(c.fall for c in clusters) == pytest.approx(0)


def test_null_is_unknown(written: Path) -> None:
    """Strict JSON spells a standard error of a single score as null."""
    assert math.isnan(read_decisions(written)[0].domains["logs"].worth.standard_error)


def test_parts_that_a_plan_of_domains_alone_lacks(written: Path) -> None:
    for file in (written / "decisions").iterdir():
        line = json.loads(file.read_text())
        for name in ("clusters", "documents", "stopped_examples"):
            del line[name]
        file.write_text(json.dumps(line))
    last = read_decisions(written)[-1]
    assert (last.clusters, last.scored, last.stopped_examples) == ((), 0, ())
    assert math.isnan(last.share_top_tenth)


def test_those_of_the_bandit(tmp_path: Path) -> None:
    (tmp_path / "decisions").mkdir()
    line = {"kind": "odm", "step": 4, "utilities_until": 2, "domains": {"a": {"weight": 1, "mean": 2.5, "epochs": 0.5}}}
    (tmp_path / "decisions" / "odm-000000004.json").write_text(json.dumps(line))
    (found,) = read_decisions(tmp_path)
    assert (found.kind, found.domains["a"].weight, found.domains["a"].epochs) == ("odm", 1, 0.5)
    assert found.domains["a"].worth.mean == 2.5
    assert math.isnan(found.domains["a"].worth.standard_error)


def test_no_decisions_and_those_of_others(tmp_path: Path) -> None:
    assert read_decisions(tmp_path) == []
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "mixture-000000001.json").write_text("{}")
    assert read_decisions(tmp_path) == []


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"kind": "odm", "step": 1, "utilities_until": 0, "domains": {"a": {}}}']
)
def test_a_damaged_file_is_named(written: Path, content: str) -> None:
    (written / "decisions" / "feedback-000000040.json").write_text(content)
    with pytest.raises(UserError, match=r"feedback-000000040\.json is damaged"):
        read_decisions(written)
