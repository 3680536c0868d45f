"""Turns what a step returned into totals, metric lines, the selection log and the progress bar."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from opus_jax.config import Config
from opus_jax.training import digest
from opus_jax.training.audit import WARN_BELOW
from opus_jax.training.costs import StepCosts
from opus_jax.training.goodput import Goodput
from opus_jax.training.metrics import MetricsWriter
from opus_jax.training.nonfinite import left_out_update
from opus_jax.training.progress import Progress
from opus_jax.training.scoring import SCORING_METHODS
from opus_jax.training.selection_log import SelectionLog
from opus_jax.training.steering import Steering
from opus_jax.training.totals import Totals


@dataclass(frozen=True)
class Done:
    """A dispatched step whose results have not been looked at yet. `step` counts completed updates, from 1.

    Where a step did not choose, its metrics have no `selected` and no `utility`: every row was trained on.
    """

    step: int
    host: Mapping[str, np.ndarray]  # the candidate rows; ids and domains of all, whatever process has their tokens
    metrics: Mapping[str, jax.Array]
    audit: Mapping[str, jax.Array] | None
    waited: float
    timed: bool  # False for a step that compiled something


class Recorder:
    """Writes the logs of a run and tells the steering what was scored; `record` blocks until the step it is given has
    finished on the devices."""

    def __init__(
        self, config: Config, domains: list[str], costs: StepCosts, totals: Totals, steering: Steering,
        writer: MetricsWriter | None, log: SelectionLog | None, progress: Progress, goodput: Goodput,
    ):  # fmt: skip
        self.config, self.domains, self.costs, self.totals = config, domains, costs, totals
        self.steering, self.writer, self.log, self.progress = steering, writer, log, progress
        self.goodput = goodput
        self._finished = time.perf_counter()

    def restart_clock(self) -> None:
        """The time since the last step was not spent in steps (evaluation, saving)."""
        self._finished = time.perf_counter()

    def flush(self) -> None:
        """Put on disk what was written: before a checkpoint that counts on it."""
        for file in (self.writer, self.log):
            if file is not None:
                file.flush()

    def record(self, done: Done) -> None:
        metrics = {name: np.asarray(value) for name, value in jax.device_get(dict(done.metrics)).items()}
        scored = "utility" in metrics and self.config.selection.method in SCORING_METHODS
        metrics = _of_all_rows(len(done.host["domain_id"])) | metrics
        seconds = time.perf_counter() - self._finished
        self._finished += seconds
        self._count(done, metrics, seconds)
        self._steer(done, metrics, scored)
        if self.log is not None:
            self.log.write(done.step, _log_columns(done.host, metrics, scored))
        line = self._line(done, metrics, seconds, scored)
        due = done.step % self.config.run.log_every == 0 or done.step == self.config.run.steps
        if due or done.audit is not None:
            self._write(line)
        self.progress.update(done.step, line)
        rows = np.asarray(done.host["example_id"])
        self._warn(unreadable_rows(done.step, rows[metrics["unreadable"]].tolist()))
        trained = rows[metrics["indices"]].tolist()
        self._warn(left_out_update(done.step, trained, metrics, self.totals.skipped_updates, self.config.run))

    def _warn(self, warning: str | None) -> None:
        if warning is not None:
            self.progress.warn(warning)

    def evaluated(self, step: int, bits: dict[str, float], target: float) -> None:
        """Log an evaluation: bits per byte by domain, and over the target domains."""
        self.totals.bits_per_byte, self.totals.target_bits_per_byte = bits, target
        self._write({"step": step, "bits_per_byte": bits, "target_bits_per_byte": target} | self._totals())
        self.progress.evaluated(step, bits, target)

    def _steer(self, done: Done, metrics: dict[str, Any], scored: bool) -> None:
        """Hand the step's signal to what decides the next plan."""
        if self.config.feedback.signal == "odm":
            self.steering.record(done.step - 1, metrics["row_loss"], done.host, metrics["indices"])
        else:
            self.steering.record(done.step - 1, metrics["utility"] if scored else None, done.host)

    def _write(self, line: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(line)

    def _count(self, done: Done, metrics: dict[str, Any], seconds: float) -> None:
        totals, tokens = self.totals, int(metrics["update_tokens"])
        totals.update_tokens += tokens
        totals.skipped_updates += int(metrics["skipped"])
        totals.unreadable_rows += int(metrics["unreadable"].sum())
        totals.seen_tokens += int(metrics["seen_tokens"])
        totals.update_flops += self.costs.training(done.step - 1, self.steering.buffers)
        totals.selection_flops += self.costs.selection(done.step - 1, self.config, self.steering.buffers)
        totals.audit_flops += self.costs.audit if done.audit is not None else 0
        if done.timed:
            totals.timed_tokens += tokens
            totals.timed_seconds += seconds
        totals.count_rows(np.asarray(done.host["domain_id"]), metrics["selected"])
        ids = np.asarray(done.host["example_id"], np.int64)[metrics["indices"]]
        totals.loss_digest = digest.extend(totals.loss_digest, np.float32(metrics["loss"]).tobytes())
        totals.batch_digest = digest.extend(totals.batch_digest, ids.tobytes())

    def _line(self, done: Done, metrics: dict[str, Any], seconds: float, scored: bool) -> dict[str, Any]:
        chosen = np.asarray(done.host["domain_id"])[metrics["selected"]]
        share = np.bincount(chosen, minlength=len(self.domains)) / max(len(chosen), 1)
        utilities = metrics["utility"][np.isfinite(metrics["utility"])] if scored else np.zeros(0)
        line = {
            "step": done.step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(metrics["learning_rate"]),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_second": int(metrics["update_tokens"]) / max(seconds, 1e-9),
            "data_wait_seconds": done.waited,
            "utility_mean": float(utilities.mean(dtype=np.float64)) if utilities.size else None,
            "utility_sd": float(utilities.std(dtype=np.float64)) if utilities.size else None,
            "temperature": float(metrics["temperature"]) if scored else None,
            "selected_share": dict(zip(self.domains, share.tolist(), strict=True)),
            "selected_at_random": bool(metrics["selected_at_random"]),
            "nonfinite_direction": int(metrics["nonfinite_direction"]),
            "nonfinite_utilities": int(metrics["nonfinite_utilities"]),
            "document_share": float(metrics["document_share"]),
        }
        if line["selected_at_random"] and scored:
            self.progress.warn(f"step {done.step}: all utilities are equal, so the rows were chosen at random")
        if done.audit is not None:
            line |= {name: float(value) for name, value in done.audit.items()}
            agreement = float(done.audit["audit_rank_agreement"])
            if agreement < WARN_BELOW:
                self.progress.warn(
                    f"step {done.step}: utilities agree with exact per-example gradients only to {agreement:.2f} "
                    f"(Spearman over {self.config.selection.audit_rows} rows; below {WARN_BELOW})"
                )
        return line | self._totals()

    def _totals(self) -> dict[str, Any]:
        totals = self.totals
        self.goodput.stamp(totals)
        return {
            "update_tokens": totals.update_tokens,
            "seen_tokens": totals.seen_tokens,
            "flops": totals.flops,
            "scoring_overhead": totals.scoring_overhead,
            "goodput_seconds": totals.goodput,
            "skipped_updates": totals.skipped_updates,
            "unreadable_rows": totals.unreadable_rows,
        }


def unreadable_rows(step: int, rows: list[int]) -> str | None:
    """The warning for a step that was offered rows whose records cannot be read, if any."""
    return f"step {step}: rows {rows} cannot be read and stand there without text" if rows else None


def _log_columns(host: Mapping[str, np.ndarray], metrics: dict[str, Any], scored: bool) -> dict[str, np.ndarray]:
    """Columns of the selection log; where nothing was scored, utilities are null."""
    columns = {name: np.asarray(host[name]) for name in ("example_id", "domain_id")}
    named = ("utility", "z", "probability", "redundancy", "selected") if scored else ("probability", "selected")
    return columns | {name: metrics[name] for name in named}


def _of_all_rows(rows: int) -> dict[str, np.ndarray]:
    """What a step that trains on all its rows would have said of its choice."""
    return {
        "selected": np.ones(rows, bool),
        "indices": np.arange(rows),
        "probability": np.ones(rows, np.float32),
        "selected_at_random": np.asarray(True),
        "nonfinite_direction": np.asarray(0),
        "nonfinite_utilities": np.asarray(0),
        "document_share": np.asarray(1.0),
        "skipped": np.asarray(False),
        "unreadable": np.zeros(rows, bool),
    }
