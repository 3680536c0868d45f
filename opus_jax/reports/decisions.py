"""What the stream was told to offer: `decisions/*.json` of a run folder, one file for each change of plan."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opus_jax.errors import UserError

FOLDER = "decisions"
KINDS = ("feedback", "odm")  # by utilities of candidates; by losses of trained rows


@dataclass(frozen=True)
class Worth:
    """What scores say of a group, NaN where unknown: mean score, its standard error, number of scores behind it."""

    mean: float
    standard_error: float
    scores: float


@dataclass(frozen=True)
class DomainPlan:
    """A domain under a plan: its share of the stream, and passes over it before the plan."""

    weight: float
    epochs: float
    worth: Worth


@dataclass(frozen=True)
class ClusterPlan:
    """Similar documents of one domain under a plan: their share of the stream, and that under the first plan."""

    cluster: int
    label: str
    domain: str
    rows: int
    share: float
    base_share: float
    worth: Worth

    @property
    def place(self) -> str:
        """What tells it from clusters of the same words, and from the same cluster in another domain."""
        return f"{self.domain} {self.cluster}".lstrip()

    @property
    def fall(self) -> float:
        """Share of the stream that it lost; negative if it gained."""
        return self.base_share - self.share


@dataclass(frozen=True)
class StoppedDocument:
    """A document of which the stream offers less than at first; share_ratio = its share now over its first."""

    document_id: int
    domain: str
    share_ratio: float


@dataclass(frozen=True)
class Decision:
    """One change of plan.

    Attributes:
      kind: of KINDS. The scores of `feedback` are z-scores, those of `odm` rewards.
      step: updates done before the plan holds. utilities_until: the last update whose scores it used.
      scored: documents with scores. stopped: documents whose share fell below a tenth of their first.
      share_top_tenth: share of the stream of the tenth of rows with the highest priority; NaN where unknown.
    """

    kind: str
    step: int
    utilities_until: int
    domains: dict[str, DomainPlan]
    clusters: tuple[ClusterPlan, ...]
    scored: int
    stopped: int
    share_top_tenth: float
    stopped_examples: tuple[StoppedDocument, ...]


def read_decisions(run_folder: Path) -> list[Decision]:
    """All plan changes of a run by step; none for a run whose plan never changed.

    Raises:
      UserError: a file is damaged.
    """
    files = [file for kind in KINDS for file in (run_folder / FOLDER).glob(f"{kind}-*.json")]
    return sorted(map(_read, files), key=lambda decision: decision.step)


def _read(file: Path) -> Decision:
    try:
        return _decision(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is damaged ({reason}): delete it; the report then leaves that change out") from None


def _decision(line: dict[str, Any]) -> Decision:
    documents = line.get("documents") or {}
    return Decision(
        kind=str(line["kind"]),
        step=int(line["step"]),
        utilities_until=int(line["utilities_until"]),
        domains={str(name): _domain(domain) for name, domain in line["domains"].items()},
        clusters=tuple(_cluster(cluster) for cluster in line.get("clusters") or []),
        scored=int(documents.get("scored") or 0),
        stopped=int(documents.get("stopped") or 0),
        share_top_tenth=_number(documents, "share_top_tenth"),
        stopped_examples=tuple(
            StoppedDocument(int(x["document_id"]), str(x["domain"]), _number(x, "share_ratio"))
            for x in line.get("stopped_examples") or []
        ),
    )


def _domain(line: dict[str, Any]) -> DomainPlan:
    return DomainPlan(float(line["weight"]), _number(line, "epochs"), _worth(line))


def _cluster(line: dict[str, Any]) -> ClusterPlan:
    share, base_share = float(line["share"]), float(line["base_share"])
    name = (int(line["cluster"]), str(line["label"]), str(line.get("domain", "")))
    return ClusterPlan(*name, int(line["rows"]), share, base_share, _worth(line))


def _worth(line: dict[str, Any]) -> Worth:
    return Worth(*(_number(line, key) for key in ("mean", "standard_error", "scores")))


def _number(line: dict[str, Any], key: str) -> float:
    """Absent and null, as strict JSON spells what is not finite, are NaN."""
    value = line.get(key)
    return math.nan if value is None else float(value)
