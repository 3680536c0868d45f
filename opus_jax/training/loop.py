"""The training loop: the order of events of a run, from preparing the corpus to the summary.

Order matters in three places and is not to be changed: a step's results are read only after the next step was
dispatched (the devices never wait for the host); a checkpoint is taken only when every step before it is recorded
(its totals and digests are those of its weights); logs are flushed before a checkpoint is committed.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from opus_jax.config import Config, fingerprint, replace
from opus_jax.data.buffers import Buffers, every_step
from opus_jax.data.cache import cache_folder
from opus_jax.data.candidates import CandidateStream
from opus_jax.data.plan import Plan
from opus_jax.data.remote import is_remote
from opus_jax.distributed.agreement import of_first, require_one_history, require_same, same_fate
from opus_jax.distributed.compilation_cache import keep_compiled_programs
from opus_jax.distributed.lost import needing_all_processes
from opus_jax.errors import InterruptedRunError, PreemptedRunError, UserError
from opus_jax.models.transformer import parameter_count
from opus_jax.training.build import Parts, buffers_of, build
from opus_jax.training.checkpoint import Checkpoints
from opus_jax.training.costs import step_costs
from opus_jax.training.decisions import describe
from opus_jax.training.feed import Fed, Feed, rows_held
from opus_jax.training.first_weights import first_weights
from opus_jax.training.goodput import Goodput, shares
from opus_jax.training.interrupt import stop_signals
from opus_jax.training.metrics import MetricsWriter
from opus_jax.training.overhead_budget import describe as describe_budget
from opus_jax.training.overhead_budget import within_budget
from opus_jax.training.preemption import Stopping, service_is_on
from opus_jax.training.profiler import NO_STEPS, Profiler
from opus_jax.training.progress import Progress
from opus_jax.training.recorder import Done, Recorder
from opus_jax.training.remote_run import RemoteRun
from opus_jax.training.run_folder import (
    needing_space,
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
from opus_jax.training.watchdog import Watchdog


def train(config: Config, *, progress: bool = True, profile: range = NO_STEPS) -> dict[str, Any]:
    """Train, or go on with, the run of `config.run.dir`; returns what is in summary.json.

    Args:
      progress: show a progress bar on standard error.
      profile: steps to trace into `<run folder>/profile`, counted from 1.

    Raises:
      UserError: something only the user can put right; nothing was lost.
      InterruptedRunError: Ctrl-C, or SIGTERM (PreemptedRunError); the state was saved and the same command goes on
        from it.
    """
    assert config.run.dir is not None, "Config.load names the run folder"
    cache = cache_folder(config.corpus)
    with Goodput() as goodput:
        keep_compiled_programs(config.run.compilation_cache, cache)
        if not is_remote(config.run.dir):
            return _train(config, Path(config.run.dir), goodput, progress=progress, profile=profile)
        with RemoteRun(config.run.dir, cache) as there:
            return _train(config, there.folder, goodput, progress=progress, profile=profile, committed=there.send)


def _train(
    config: Config, folder: Path, goodput: Goodput, *, progress: bool, profile: range,
    committed: Callable[[], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    writes = jax.process_index() == 0
    with same_fate():
        if config.selection.max_overhead is None:  # otherwise some keys are decided by the model, still to be built
            refuse_changed_config(folder, config)
        parts = build(config, progress=progress and writes)
        config = within_budget(parts.spec, config)
        parts = replace(parts, config=config)
    _require_same_run(parts)
    with (
        needing_space(folder),
        open_run_folder(folder, config),
        _checkpoints(folder, config, committed) as checkpoints,
        stop_signals(sigterm=not service_is_on()) as asked,
    ):
        with needing_all_processes(), same_fate():
            state, steering, totals = _start(parts, checkpoints)
        goodput.go_on(totals)
        write_records_place(folder, parts.records, parts.manifest.fingerprint)
        summary = of_first(lambda: read_summary(folder)) if int(state.step) == config.run.steps else None
        if summary is not None:
            return summary
        with (
            _logs(parts, folder, int(state.step), totals, steering, progress, goodput) as recorder,
            Profiler(folder, profile, config.run.steps) as profiler,
            Watchdog(config.run.watchdog_seconds, "the same command goes on from the newest checkpoint") as watchdog,
            goodput.spent("step"),
            needing_all_processes(),
        ):
            _run(parts, checkpoints, recorder, state, Stopping(asked), watchdog, profiler)
        goodput.stamp(totals)
        summary = _summary(parts, totals)
        with same_fate():
            if writes:
                write_summary(folder, summary)
    return summary


def _require_same_run(parts: Parts) -> None:
    """Raise UserError in every process unless all train the same run on the same rows."""
    require_same("their configuration: start all with the same file and changes", fingerprint(parts.config))
    rows = fingerprint(parts.manifest.fingerprint, parts.manifest.files)
    require_same("the corpus they prepared: give all the same texts, or one corpus.cache_dir that all see", rows)


def _checkpoints(folder: Path, config: Config, committed: Callable[[], None] | None = None) -> Checkpoints:
    settings, run = config.checkpoint, config.run
    host_bytes = None if settings.host_gigabytes is None else int(settings.host_gigabytes * 1e9)
    return Checkpoints(
        folder / "checkpoints", keep=settings.keep, best=settings.best, host_bytes=host_bytes,
        lasting=lambda step: step % run.save_every == 0 or step == run.steps, committed=committed,
    )  # fmt: skip


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
    parts: Parts, folder: Path, step: int, totals: Totals, steering: Steering, progress: bool,
    goodput: Goodput,
) -> Iterator[Recorder]:  # fmt: skip
    """Every process keeps the same totals; only process 0 writes."""
    config, writes = parts.config, jax.process_index() == 0
    chooses = config.selection.method != "none"
    with ExitStack() as open_files:
        with same_fate():
            writer = MetricsWriter(folder, config.tracking, resume_step=step) if writes else None
            open_files.enter_context(writer or nullcontext())
            logged = writes and chooses and config.tracking.selection_log
            log = open_files.enter_context(closing(SelectionLog(folder, resume_step=step))) if logged else None
            bar = open_files.enter_context(Progress(config.run.steps, step, enabled=progress and writes))
            domains = list(parts.manifest.domains)
            if config.selection.max_overhead is not None:
                bar.say(_named(describe_budget(parts.spec, config)))
            if writes:
                steering.write_decisions(folder, step, describe(domains))
        yield Recorder(config, domains, step_costs(parts.spec, config), totals, steering, writer, log, bar, goodput)


def _run(
    parts: Parts, checkpoints: Checkpoints, recorder: Recorder, state: TrainState, stopping: Stopping, dog: Watchdog,
    profiler: Profiler,
) -> None:  # fmt: skip
    """All remaining steps."""
    config, first, buffers = parts.config, int(state.step), parts.buffers
    clock, goodput = _Clock(recorder.totals), recorder.goodput
    candidates = Feed(goodput.waiting(_candidates(parts, recorder.steering, first)), parts.mesh)
    proxies = _Proxies(parts, first, goodput) if parts.directed else None
    compiled: set[bool] = set()
    pending: Done | None = None
    for step in range(first + 1, config.run.steps + 1):
        fed = candidates.take()
        chooses = buffers.chooses(step - 1)
        proxy = proxies.at(step - 1) if proxies and chooses else None
        audited = proxy is not None and _audited(config, step)
        dog.alive(f"step {step}", compiles=audited or chooses not in compiled)
        if pending is not None and (audited or profiler.starts(step)):  # their time is not the earlier step's
            recorder.record(pending)
            pending = None
        audit = parts.audit(state, fed.device, proxy.device) if audited and proxy else None
        advance = parts.step if chooses else parts.update_step
        with profiler.step(step):
            state, metrics = advance(state, fed.device, proxy.device if proxy else None)
        if pending is not None:
            recorder.record(pending)
        checkpoints.check()
        timed = chooses in compiled and not audited
        compiled.add(chooses)
        pending = Done(step, fed.host, metrics, audit, candidates.waited, timed)
        if step < config.run.steps:
            candidates.ahead()
        last, stop = step == config.run.steps, stopping.after(step)  # asked once: what is said must be what was done
        evaluate = step % config.run.eval_every == 0 or last
        save = _saved(config, step) or last or stop is not None
        if not (evaluate or save or profiler.ends(step)):
            continue
        recorder.record(pending)
        pending = None
        profiler.stop_after(step)
        if evaluate:
            dog.alive(f"the evaluation after step {step}", compiles=True)
            with goodput.spent("evaluate"):
                recorder.evaluated(step, *parts.evaluate_target(state.params))
        if save:
            clock.stamp()
            dog.alive(f"saving step {step}")
            with goodput.spent("save"):
                _save(parts, checkpoints, recorder, state, evaluated=evaluate)
        recorder.restart_clock()
        if stop is not None and not last:
            checkpoints.wait()
            kind = PreemptedRunError if stop == signal.SIGTERM else InterruptedRunError
            raise kind(f"stopped after step {step}, saved in {config.run.dir}; the same command goes on from there")
    with goodput.spent("save"):
        checkpoints.wait()
    clock.stamp()


def _saved(config: Config, step: int) -> bool:
    """Whether a checkpoint is due after so many steps, lasting or temporary."""
    temporary = config.checkpoint.temporary_every
    return step % config.run.save_every == 0 or (temporary is not None and step % temporary == 0)


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

    def __init__(self, parts: Parts, first: int, goodput: Goodput):
        rows = every_step(parts.config.proxy.rows)
        self._refresh, self._buffers = parts.config.proxy.refresh, parts.buffers
        turn = self._turn(first)
        stream = _stream(parts, parts.reader("proxy"), parts.proxy_plan(), rows, turn)
        self._feed = Feed(goodput.waiting(stream), parts.mesh)
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
        reader, plan, parts.config.run.seed, buffers, start_step=start, held=partial(rows_held, parts.mesh)
    )


def _save(parts: Parts, checkpoints: Checkpoints, recorder: Recorder, state: TrainState, *, evaluated: bool) -> None:
    recorder.flush()
    steering = recorder.steering.to_arrays()
    require_one_history(recorder.totals.loss_digest, recorder.totals.batch_digest, steering)
    recorder.goodput.stamp(recorder.totals)
    meta = {
        "totals": recorder.totals.to_mapping(),
        "records": parts.manifest.fingerprint,
        "tokenizer": parts.manifest.tokenizer_hash,
    }
    target = recorder.totals.target_bits_per_byte if evaluated else None  # an older figure is not this step's
    checkpoints.save(int(state.step), state, steering, meta, target)


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
        "goodput": shares(totals.goodput),
        "goodput_seconds": totals.goodput,
        "attempts": totals.attempts,
        "tokens_per_second": totals.tokens_per_second,
        "scoring_overhead": totals.scoring_overhead,
        "max_overhead_picks": within,
        "bits_per_byte": totals.bits_per_byte,
        "target_bits_per_byte": totals.target_bits_per_byte,
        "selected_share": totals.selected_share(list(parts.manifest.domains)),
        "skipped_updates": totals.skipped_updates,
        "unreadable_rows": totals.unreadable_rows,
        "loss_digest": totals.loss_digest,
        "batch_digest": totals.batch_digest,
        "parameters": parameter_count(parts.spec),
    }
