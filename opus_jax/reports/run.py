"""A run folder as data: configuration, summary and metrics, of a run that has ended, is going on, or was killed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from opus_jax.config import Config
from opus_jax.errors import UserError
from opus_jax.reports.budgets import epochs, step_seconds
from opus_jax.reports.corpus import manifest_of
from opus_jax.reports.decisions import Decision, read_decisions
from opus_jax.reports.selection_reader import SelectionReader
from opus_jax.reports.series import EMPTY, Series


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself.

    Attributes:
      name: what it is called in the report: its folder's name.
      summary: summary.json; None while the run is unfinished.
      scalars: metrics by name; `seconds` and `epochs`, which no run logs, are made from others (see budgets).
      by_domain: metrics that have one value for each domain: by name, then by domain.
    """

    folder: Path
    name: str
    config: Config
    summary: dict[str, Any] | None
    scalars: dict[str, Series] = field(repr=False)
    by_domain: dict[str, dict[str, Series]] = field(repr=False)

    @property
    def method(self) -> str:
        return self.config.selection.method

    @property
    def steps(self) -> int:
        """The last step in the log; 0 if there is none."""
        return int(self["loss"].steps[-1]) if len(self["loss"].steps) else 0

    @property
    def domains(self) -> list[str]:
        """Names in the order of the domain ids; empty before the first logged step."""
        return list(self.by_domain.get("selected_share", {}))

    @property
    def targets(self) -> list[str]:
        """Domains whose validation text is the target: the proxy's, or all."""
        return list(self.config.proxy.domains) or self.domains

    @property
    def scores(self) -> bool:
        """Whether the method measures the candidates it chooses from."""
        return self.method not in ("random", "none")

    @property
    def scores_are_losses(self) -> bool:
        """Whether those measures are the candidates' own losses."""
        return self.method in ("high_loss", "mid_loss")

    @cached_property
    def selection(self) -> SelectionReader:
        """The selection log; nothing is read before it is asked for something."""
        return SelectionReader(self.folder / "selection")

    @cached_property
    def decisions(self) -> list[Decision]:
        """Changes of plan; nothing is read before it is asked for."""
        return read_decisions(self.folder)

    def __getitem__(self, metric: str) -> Series:
        """A metric by name, without any point if the run never logged it."""
        return self.scalars.get(metric, EMPTY)

    def at(self, metric: str, steps: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """A running total at any steps: between logged steps by interpolation, NaN if it was never logged."""
        series = self[metric]
        if not len(series.steps):
            return np.full(len(steps), np.nan)
        return np.interp(steps, series.steps, series.values)

    def total(self, metric: str) -> float | None:
        """The run's final value of a total: from the summary, else the last one logged, else None."""
        if self.summary is not None and self.summary.get(metric) is not None:
            return float(self.summary[metric])
        return self[metric].last


def load_run(folder: str | Path) -> Run:
    """Read a run folder. A torn last line of metrics.jsonl, as a running or killed process leaves, is not read.

    Raises:
      UserError: the folder is not a run, or one of its files is damaged.
    """
    folder = Path(folder).resolve()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder (config.yaml is absent): give the run.dir of a training run")
    scalars, by_domain = _columns(_lines(folder / "metrics.jsonl"))
    scalars = _budgets(folder, scalars) | scalars
    return Run(folder, folder.name, Config.load(folder), _summary(folder / "summary.json"), scalars, by_domain)


def sibling(run: Run, suffix: str = "-random") -> Path | None:
    """The run folder beside this one that has this one's name and a suffix, if there is one."""
    folder = run.folder.with_name(run.folder.name + suffix)
    return folder if (folder / "config.yaml").is_file() else None


def _budgets(folder: Path, scalars: dict[str, Series]) -> dict[str, Series]:
    """What can be made of the totals; epochs only while the prepared corpus is on this machine."""
    seconds = step_seconds(scalars.get("update_tokens", EMPTY), scalars.get("tokens_per_second", EMPTY))
    manifest = manifest_of(folder)
    passes = epochs(scalars.get("seen_tokens", EMPTY), manifest) if manifest else EMPTY
    return {name: series for name, series in (("seconds", seconds), ("epochs", passes)) if len(series.steps)}


def _summary(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete it, and run the training command again") from None


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith("\n"):
                return
            try:
                yield _restored(_with_step(json.loads(line)))
            except ValueError as error:
                raise UserError(f"{file}:{number} is damaged ({error}): delete that line") from None


def _with_step(line: Any) -> dict[str, Any]:
    if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
        raise ValueError("it is not an object with a step")
    return line


def _restored(line: dict[str, Any]) -> dict[str, Any]:
    """Numbers that strict JSON cannot hold stand as null and are named under `nonfinite`."""
    lost = line.pop("nonfinite", {})
    for name, value in line.items():
        if isinstance(value, dict):
            line[name] = {
                domain: np.nan if x is None and f"{name}/{domain}" in lost else x for domain, x in value.items()
            }
        elif value is None and name in lost:
            line[name] = np.nan
    return line


def _columns(lines: Iterator[dict[str, Any]]) -> tuple[dict[str, Series], dict[str, dict[str, Series]]]:
    scalars: dict[str, dict[int, float]] = {}
    nested: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        step = int(line["step"])
        for name, value in line.items():
            if isinstance(value, dict):
                for domain, x in value.items():
                    if isinstance(x, int | float):
                        nested.setdefault(name, {}).setdefault(domain, {})[step] = float(x)
            elif isinstance(value, int | float):
                scalars.setdefault(name, {})[step] = float(value)
    return (
        {name: _series(points) for name, points in scalars.items()},
        {name: {domain: _series(points) for domain, points in inner.items()} for name, inner in nested.items()},
    )


def _series(points: dict[int, float]) -> Series:
    order = sorted(points)
    return Series(np.array(order, np.int64), np.array([points[step] for step in order]))
