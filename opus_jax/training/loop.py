"""The training loop: the order of events of a run, from preparing the corpus to the summary.

Order matters in three places and is not to be changed: a step's results are read only after the next step was
dispatched (the devices never wait for the host); a checkpoint is taken only when every step before it is recorded
(its totals and digests are those of its weights); logs are flushed before a checkpoint is committed.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax

from opus_jax.config import Config, replace
from opus_jax.data.buffers import Buffers, every_step
from opus_jax.data.candidates import CandidateStream
from opus_jax.data.plan import Plan
from opus_jax.errors import InterruptedRunError, UserError
from opus_jax.models.transformer import parameter_count
from opus_jax.training.build import Parts, buffers_of, build
from opus_jax.training.checkpoint import Checkpoints
from opus_jax.training.costs import step_costs
from opus_jax.training.decisions import describe
from opus_jax.training.feed import Fed, Feed
from opus_jax.training.first_weights import first_weights
from opus_jax.training.interrupt import stop_signals
from opus_jax.training.metrics import MetricsWriter
from opus_jax.training.overhead_budget import describe as describe_budget
from opus_jax.training.overhead_budget import within_budget
from opus_jax.training.progress import Progress
from opus_jax.training.recorder import Done, Recorder
from opus_jax.training.run_folder import (
    open_run_folder,
    read_summary,
    refuse_changed_config,
    write_records_place,
    write_summary,
)
from opus_jax.training.selection_log import SelectionLog
from opus_jax.training.state import TrainState, init_state
from opus_jax.training.steering import Steering
from opus_jax.training.totals import Totals


def train(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Train, or go on with, the run of `config.run.dir`; returns what is in summary.json.

    Raises:
      UserError: something only the user can put right; nothing was lost.
      InterruptedRunError: Ctrl-C or SIGTERM; the state was saved and the same command goes on from it.
    """
    assert config.run.dir is not None, "Config.load names the run folder"
    folder = Path(config.run.dir)
    if config.selection.max_overhead is None:  # otherwise some keys are decided by the model, which has to be built
        refuse_changed_config(folder, config)
    parts = build(config, progress=progress)
    config = within_budget(parts.spec, config)
    parts = replace(parts, config=config)
    with open_run_folder(folder, config), _checkpoints(folder, config) as checkpoints, stop_signals() as stop:
        state, steering, totals = _start(parts, checkpoints)
        write_records_place(folder, parts.records, parts.manifest.fingerprint)
        if int(state.step) == config.run.steps and (summary := read_summary(folder)) is not None:
            return summary
        with _logs(parts, folder, int(state.step), totals, steering, progress) as recorder:
            _run(parts, checkpoints, recorder, state, stop)
        summary = _summary(parts, totals)
        if jax.process_index() == 0:
            write_summary(folder, summary)
    return summary


def _checkpoints(folder: Path, config: Config) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep, best=config.checkpoint.best)


def _start(parts: Parts, checkpoints: Checkpoints) -> tuple[TrainState, Steering, Totals]:
    """The newest good checkpoint, or a fresh state."""
    steering = parts.steering()
    restored = checkpoints.restore(parts.abstract_state())
    if restored is not None:
        _, state, data, meta = restored
        if meta["records"] != parts.manifest.fingerprint:
            raise UserError(
                f"{parts.config.run.dir} was trained on records {meta['records']}, but the corpus now gives "
                f"{parts.manifest.fingerprint}: restore the corpus, or choose another run.dir"
            )
        steering.restore(data)
        return state, steering, Totals.from_mapping(meta["totals"])
    config = parts.config
    params = first_weights(parts) if config.model.init_from else None
    state = init_state(parts.spec, parts.optimizer, config.run.seed, parts.mesh, directed=parts.directed, params=params)
    return state, steering, Totals.start(len(parts.manifest.domains))


@contextmanager
def _logs(
    parts: Parts, folder: Path, step: int, totals: Totals, steering: Steering, progress: bool
) -> Iterator[Recorder]:
    """Every process keeps the same totals; only process 0 writes."""
    config, writes = parts.config, jax.process_index() == 0
    chooses = config.selection.method != "none"
    with ExitStack() as open_files:
        writer = open_files.enter_context(MetricsWriter(folder, config.tracking, resume_step=step)) if writes else None
        logged = writes and chooses and config.tracking.selection_log
        log = open_files.enter_context(closing(SelectionLog(folder, resume_step=step))) if logged else None
        bar = open_files.enter_context(Progress(config.run.steps, step, enabled=progress and writes))
        domains = list(parts.manifest.domains)
        if config.selection.max_overhead is not None:
            bar.say(_named(describe_budget(parts.spec, config)))
        if writes:
            steering.write_decisions(folder, step, describe(domains))
        yield Recorder(config, domains, step_costs(parts.spec, config), totals, steering, writer, log, bar)


def _run(parts: Parts, checkpoints: Checkpoints, recorder: Recorder, state: TrainState, stop: threading.Event) -> None:
    """All remaining steps."""
    config, first, buffers = parts.config, int(state.step), parts.buffers
    clock = _Clock(recorder.totals)
    candidates = Feed(_candidates(parts, recorder.steering, first), parts.mesh)
    proxies = _Proxies(parts, first) if parts.directed else None
    compiled: set[bool] = set()
    pending: Done | None = None
    for step in range(first + 1, config.run.steps + 1):
        fed = candidates.take()
        chooses = buffers.chooses(step - 1)
        proxy = proxies.at(step - 1) if proxies and chooses else None
        audited = proxy is not None and _audited(config, step)
        if pending is not None and audited:  # an audit's time is not the earlier step's
            recorder.record(pending)
            pending = None
        audit = parts.audit(state, fed.device, proxy.device) if audited and proxy else None
        advance = parts.step if chooses else parts.update_step
        state, metrics = advance(state, fed.device, proxy.device if proxy else None)
        if pending is not None:
            recorder.record(pending)
        checkpoints.check()
        timed = chooses in compiled and not audited
        compiled.add(chooses)
        pending = Done(step, fed.host, metrics, audit, candidates.waited, timed)
        if step < config.run.steps:
            candidates.ahead()
        last, stopping = step == config.run.steps, stop.is_set()  # asked once: what is said must be what was done
        evaluate = step % config.run.eval_every == 0 or last
        save = step % config.run.save_every == 0 or last or stopping
        if not (evaluate or save):
            continue
        recorder.record(pending)
        pending = None
        if evaluate:
            recorder.evaluated(step, *parts.evaluate_target(state.params))
        if save:
            clock.stamp()
            _save(parts, checkpoints, recorder, state, evaluated=evaluate)
        recorder.restart_clock()
        if stopping and not last:
            checkpoints.wait()
            raise InterruptedRunError(
                f"stopped after step {step}, saved in {config.run.dir}; the same command goes on from there"
            )
    checkpoints.wait()
    clock.stamp()


def _audited(config: Config, step: int) -> bool:
    """Audits begin with the first scored step and come back with the first one after every `audit_every` steps."""
    every, scored = config.selection.audit_every, step - 1 - config.selection.warm_start_steps
    due = bool(every) and scored % every < config.selection.select_every
    return due and config.selection.method == "opus" and buffers_of(config).chooses(step - 1)


class _Clock:
    """Adds the wall time of this process to the run's."""

    def __init__(self, totals: Totals):
        self._totals, self._since = totals, time.perf_counter()

    def stamp(self) -> None:
        now = time.perf_counter()
        self._totals.wall_seconds += now - self._since
        self._since = now


class _Proxies:
    """Proxy rows: a new batch at every refresh, the same rows in between."""

    def __init__(self, parts: Parts, first: int):
        rows = every_step(parts.config.proxy.rows)
        self._refresh, self._buffers = parts.config.proxy.refresh, parts.buffers
        turn = self._turn(first)
        self._feed = Feed(_stream(parts, parts.reader("proxy"), parts.proxy_plan(), rows, turn), parts.mesh)
        self._held, self._held_turn = self._feed.take(), turn

    def _turn(self, step: int) -> int:
        """Refreshes before the scoring at this step, or the next one after it."""
        scored = -((self._buffers.first - step) // self._buffers.every)
        return max(scored, 0) // self._refresh

    def at(self, step: int) -> Fed:
        """Rows of a step, counted from 0."""
        while self._held_turn < self._turn(step):
            self._held, self._held_turn = self._feed.take(), self._held_turn + 1
        return self._held


def _candidates(parts: Parts, steering: Steering, first: int) -> Iterator[dict[str, Any]]:
    """Candidate rows from step `first` on, by the plan in force: a new stream where a new plan may begin."""
    step, reader = first, parts.candidate_reader
    while True:
        plan, end = steering.plan_at(step)
        with closing(_stream(parts, reader, plan, parts.buffers, step)) as stream:
            while end is None or step < end:
                yield next(stream)
                step += 1


def _stream(parts: Parts, reader: Any, plan: Plan, buffers: Buffers, start: int) -> CandidateStream:
    return CandidateStream(
        reader, plan, parts.config.run.seed, buffers,
        start_step=start, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def _save(parts: Parts, checkpoints: Checkpoints, recorder: Recorder, state: TrainState, *, evaluated: bool) -> None:
    recorder.flush()
    meta = {
        "totals": recorder.totals.to_mapping(),
        "records": parts.manifest.fingerprint,
        "tokenizer": parts.manifest.tokenizer_hash,
    }
    target = recorder.totals.target_bits_per_byte if evaluated else None  # an older figure is not this step's
    checkpoints.save(int(state.step), state, recorder.steering.to_arrays(), meta, target)


def _named(picked: dict[str, Any]) -> str:
    return "selection.max_overhead picks " + ", ".join(f"{name} = {value}" for name, value in picked.items())


def _summary(parts: Parts, totals: Totals) -> dict[str, Any]:
    within = None if parts.config.selection.max_overhead is None else describe_budget(parts.spec, parts.config)
    return {
        "steps": parts.config.run.steps,
        "update_tokens": totals.update_tokens,
        "seen_tokens": totals.seen_tokens,
        "flops": totals.flops,
        "wall_seconds": totals.wall_seconds,
        "tokens_per_second": totals.tokens_per_second,
        "scoring_overhead": totals.scoring_overhead,
        "max_overhead_picks": within,
        "bits_per_byte": totals.bits_per_byte,
        "target_bits_per_byte": totals.target_bits_per_byte,
        "selected_share": totals.selected_share(list(parts.manifest.domains)),
        "loss_digest": totals.loss_digest,
        "batch_digest": totals.batch_digest,
        "parameters": parameter_count(parts.spec),
    }
