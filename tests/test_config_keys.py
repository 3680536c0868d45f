"""Every key of the configuration does something: changing it changes an observation of the main path.

The table names, for each key, what is observed, the change, and the settings under which the key matters.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import observations as see
import pytest
from jax.experimental.compilation_cache import compilation_cache
from observations import SHORT, Place

from opus_jax.config import Config

Observer = Callable[[Config, Place], Any]

MUON = "optimizer.name=muon"
LEARNED = "model.positions=learned"
LINES = ("corpus.domain_by=field", "corpus.path={place.folder}/records.jsonl")
HUB = ("corpus.name=hf", "corpus.revision=" + 40 * "a")
LEARNT_TOKENS = ("tokenizer.kind=sentencepiece", "tokenizer.vocab_size=300")
FILES = ("proxy.source=files", "proxy.path={place.folder}/other/verse", "proxy.domains=[]")
RETRIEVED = ("proxy.source=retrieved", "proxy.path={place.folder}/other/prose/0.txt", "proxy.domains=[]")
FEEDBACK = ("feedback.enabled=true", "feedback.window_steps=2", "feedback.max_epochs=20", "feedback.clusters=8")
PAIRS = ("selection.engine=ghost", "selection.redundancy=1.0", "selection.parameters=blocks")
RANDOM = "selection.method=random"  # where the key is not about scoring: its step is traced in half the time

CASES: dict[str, tuple[Any, ...]] = {
    "run.dir": (see.folder_made, "{place.folder}/elsewhere"),
    "run.seed": (see.first_loss, 1, *SHORT),
    "run.steps": (see.logged_steps, 3, *SHORT),
    "run.eval_every": (see.evaluated_steps, 4, *SHORT),
    "run.save_every": (see.saved_steps, 4, *SHORT),
    "run.log_every": (see.logged_steps, 2, *SHORT),
    "run.compilation_cache": (see.compiled_programs, "{place.folder}/programs"),
    "run.on_nonfinite": (see.step, "skip", RANDOM),
    "run.max_skipped": (see.skipped_too_often, 2),
    "run.watchdog_seconds": (see.watched_seconds, 60, RANDOM),
    "corpus.name": (see.hub_documents, "hf", *HUB[1:]),
    "corpus.path": (see.documents, "{place.folder}/other"),
    "corpus.domain_by": (see.documents, "file"),
    "corpus.domain_field": (see.documents, "kind", *LINES),
    "corpus.text_field": (see.documents, "body", *LINES),
    "corpus.revision": (see.hub_documents, 40 * "b", *HUB),
    "corpus.domains": (see.documents, "[prose]"),
    "corpus.weights": (see.records, "{{prose: 1.0}}"),
    "corpus.noise": (see.records, "{{prose: 'shuffle:0.5'}}"),
    "corpus.row_tokens": (see.records, 48),
    "corpus.max_bytes": (see.documents, 3000),
    "corpus.validation_share": (see.records, 0.3),
    "corpus.proxy_share": (see.records, 0.3),
    "corpus.strict": (see.documents, "true", *LINES),
    "corpus.lenient": (see.step, "true", RANDOM),
    "corpus.workers": (see.processes, 2),
    "corpus.cache_dir": (see.records_folder, "{place.folder}/cache-2"),
    "prepare.engine": (see.engine, "ray"),
    "tokenizer.kind": (see.records, "sentencepiece", *LEARNT_TOKENS[1:]),
    "tokenizer.path": (see.records, "{place.tokenizer}", *LEARNT_TOKENS),
    "tokenizer.vocab_size": (see.records, 320, *LEARNT_TOKENS),
    "model.preset": (see.shapes, "gpt2-small"),
    "model.norm": (see.forward, "prenorm"),
    "model.norm_kind": (see.shapes, "layernorm", "model.norm=prenorm", "model.bias=true"),
    "model.qk_norm_axis": (see.forward, "head", "model.norm=prenorm_qk"),
    "model.norm_eps": (see.forward, 1e-3),
    "model.layers": (see.shapes, 2),
    "model.width": (see.shapes, 64),
    "model.hidden": (see.shapes, 64),
    "model.heads": (see.forward, 4),
    "model.kv_heads": (see.shapes, 1),
    "model.head_dim": (see.shapes, 8),
    "model.vocab_size": (see.shapes, 300),
    "model.activation": (see.forward, "gelu"),
    "model.positions": (see.forward, "learned"),
    "model.rope_theta": (see.forward, 500.0),
    "model.max_length": (see.shapes, 64, LEARNED),
    "model.tied": (see.shapes, "true"),
    "model.bias": (see.shapes, "true", "model.norm=prenorm"),
    "model.init": (see.initialisation, "official"),
    "model.remat": (see.step, "full", RANDOM),
    "model.attention": (see.step_or_refusal, "cudnn", RANDOM),
    "model.dtype": (see.forward, "bfloat16"),
    "model.init_from": (see.first_loss, "{place.finished_run}", *SHORT),
    "optimizer.name": (see.updates, "muon"),
    "optimizer.learning_rate": (see.updates, 0.02),
    "optimizer.adam_learning_rate": (see.updates, 0.02, MUON),
    "optimizer.schedule": (see.updates, "cosine"),
    "optimizer.warmup_steps": (see.updates, 3),
    "optimizer.decay_share": (see.updates, 0.5, "optimizer.schedule=wsd"),
    "optimizer.final_share": (see.updates, 0.5, "optimizer.schedule=linear"),
    "optimizer.weight_decay": (see.updates, 0.0),
    "optimizer.decay_all": (see.updates, "true"),
    "optimizer.beta1": (see.updates, 0.5),
    "optimizer.beta2": (see.updates, 0.5),
    "optimizer.eps": (see.updates, 1e-3),
    "optimizer.momentum": (see.updates, 0.5, MUON),
    "optimizer.clip": (see.updates, "null"),
    "batch.rows": (see.step, 16, RANDOM),
    "batch.microbatch": (see.step, 4, RANDOM),
    "selection.method": (see.step, "high_loss"),
    "selection.ratio": (see.step, 0.25, RANDOM),
    "selection.temperature": (see.step, 0.25),
    "selection.entropy": (see.step, 0.8),
    "selection.unit": (see.step, "document"),
    "selection.redundancy": (see.step, 1.0),
    "selection.redundancy_rounds": (see.step, 2, "selection.redundancy=1.0"),
    "selection.engine": (see.step, "per_example"),
    "selection.sketch": (see.step, "count", *PAIRS),
    "selection.sketch_width": (see.step, 512, *PAIRS, "selection.sketch=count"),
    "selection.sketched_utilities": (see.step, "true", "selection.engine=ghost", "selection.sketch=count"),
    "selection.preconditioner": (see.step, "factored", *PAIRS),
    "selection.kernel": (see.step_or_refusal, "pallas", *PAIRS, "selection.sketch=count"),
    "selection.shared": (see.step, "true", "selection.engine=ghost"),
    "selection.derivative": (see.step, "difference"),
    "selection.direction": (see.step, "identity"),
    "selection.parameters": (see.step, "blocks"),
    "selection.rank": (see.step, 2),
    "selection.dtype": (see.step, "float32"),
    "selection.window": (see.step, 16),
    "selection.window_place": (see.step, "random", "selection.window=16"),
    "selection.score_chunk": (see.step, 8),
    "selection.warm_start_steps": (see.rows_of_steps, 4),
    "selection.select_every": (see.rows_of_steps, 2),
    "selection.max_overhead": (see.step, 1.0),
    "selection.audit_every": (see.audited_steps, 5),
    "selection.audit_rows": (see.audited_candidates, 5),
    "proxy.source": (see.records, "files", *FILES[1:]),
    "proxy.domains": (see.records, "[verse]"),
    "proxy.path": (see.records, "{place.folder}/other/prose", *FILES),
    "proxy.retrieved_share": (see.records, 0.05, *RETRIEVED),
    "proxy.embedder": (see.records, "observations:letters", *RETRIEVED),
    "proxy.limit": (see.proxy_drawn, 5),
    "proxy.rows": (see.step, 16),
    "proxy.window": (see.step, 16),
    "proxy.refresh": (see.step, 2),
    "proxy.ema": (see.step, 0.5),
    "plan.importance": (see.offered, "dsir"),
    "plan.keep": (see.offered, 0.3, "plan.importance=dsir"),
    "plan.proxy_rows_share": (see.offered, 0.5),
    "feedback.enabled": (see.offered, "true", *FEEDBACK[1:]),
    "feedback.signal": (see.offered, "odm", *FEEDBACK, "feedback.groups=[domain]"),
    "feedback.window_steps": (see.offered, 3, *FEEDBACK),
    "feedback.groups": (see.offered, "[domain]", *FEEDBACK),
    "feedback.clusters": (see.offered, 4, *FEEDBACK, "feedback.groups=[domain,cluster]"),
    "feedback.temperature": (see.offered, 0.1, *FEEDBACK),
    "feedback.shrinkage": (see.offered, 1.0, *FEEDBACK),
    "feedback.decay": (see.offered, 0.1, *FEEDBACK),
    "feedback.floor": (see.offered, 0.2, *FEEDBACK),
    "feedback.max_epochs": (see.offered, 0.2, *FEEDBACK),
    "feedback.shuffle": (see.offered, "true", *FEEDBACK),
    "evaluation.domains": (see.evaluated_rows, "[prose]"),
    "evaluation.rows": (see.evaluated_rows, 2),
    "evaluation.batch_rows": (see.evaluation_batch, 16),
    "mesh.replica": (see.mesh, 2),
    "mesh.data": (see.mesh, 2, "mesh.fsdp=2"),
    "mesh.fsdp": (see.mesh, 2),
    "mesh.tensor": (see.mesh, 2),
    "checkpoint.keep": (see.checkpoints_kept, 1, "run.save_every=1"),
    "checkpoint.best": (see.checkpoints_kept, "false", "checkpoint.keep=1", "run.save_every=1"),
    "checkpoint.temporary_every": (see.due_steps, 5),
    "checkpoint.host_gigabytes": (see.host_bytes, 1.5),
    "tracking.tensorboard": (see.trackers, "true"),
    "tracking.wandb": (see.trackers, "project"),
    "tracking.trackio": (see.trackers, "project"),
    "tracking.selection_log": (see.selection_parts, "false", *SHORT),
    "report.texts": (see.report_texts, "false"),
    "report.examples": (see.report_texts, 2),
}

TRAINED = (see.first_loss, see.logged_steps, see.evaluated_steps, see.saved_steps, see.selection_parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Runs that differ in nothing that is compiled share what was compiled."""
    folder = tmp_path_factory.mktemp("keys")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield Place(folder)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    compilation_cache.reset_cache()


_SEEN: dict[Any, Any] = {}


def observed(observe: Observer, settings: tuple[str, ...], place: Place) -> Any:
    """What is observed under settings that several keys share is observed once."""
    if (observe, settings) not in _SEEN:
        _SEEN[observe, settings] = observe(place.config(*settings), place)
    return _SEEN[observe, settings]


@pytest.mark.parametrize("key", CASES)
def test_changing_the_key_changes_behaviour(key: str, place: Place) -> None:
    observe, value, *settings = CASES[key]
    before = observed(observe, tuple(settings), place)
    after = observe(place.config(*settings, f"{key}={value}"), place)
    assert after != before


def test_every_key_has_a_test() -> None:
    keys = [f"{part.name}.{leaf.name}" for part in dataclasses.fields(Config) for leaf in _leaves(part)]
    assert list(CASES) == keys


def _leaves(part: Any) -> Any:
    return dataclasses.fields(part.default_factory)


@pytest.mark.parametrize("observe", sorted({case[0] for case in CASES.values()} - {*TRAINED}, key=lambda f: f.__name__))
def test_the_same_configuration_is_observed_alike(observe: Observer, place: Place) -> None:
    """Otherwise the tests above would prove nothing."""
    settings = next(tuple(case[2:]) for case in CASES.values() if case[0] is observe)
    assert observe(place.config(*settings), place) == observed(observe, settings, place)
