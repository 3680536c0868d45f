"""What a configuration does, as plain values that can be compared: one small piece of the main path each."""

import contextlib
import functools
import importlib.util
import json
import re
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from reports.fabricate import write_trained_pair
from small_runs import lines, small_config, write_text

from opus_jax.config import Config, TokenizerConfig, fingerprint, from_mapping, replace
from opus_jax.data import build_records, tokenize_documents
from opus_jax.data.corpora import load_corpus
from opus_jax.data.plan import initial_plan, rows_at
from opus_jax.data.prepare import prepare
from opus_jax.data.proxy_rows import proxy_plan
from opus_jax.data.records import Manifest, RowReader, batch_of
from opus_jax.data.tokenizer import load_tokenizer
from opus_jax.data.tokenizer_training import train_tokenizer
from opus_jax.distributed.compilation_cache import keep_compiled_programs
from opus_jax.distributed.mesh import make_mesh
from opus_jax.errors import NonFiniteLossError, UserError
from opus_jax.evaluation import bits_per_byte
from opus_jax.influence.ghost.scores import Scores
from opus_jax.models import transformer
from opus_jax.models.presets import resolve
from opus_jax.optim.optimizers import make_optimizer
from opus_jax.reports.html import write_report
from opus_jax.training import audit, loop
from opus_jax.training.build import buffers_of, optimizer_for
from opus_jax.training.lower_step import workshop
from opus_jax.training.metrics import MetricsWriter
from opus_jax.training.nonfinite import left_out_update
from opus_jax.training.offer import candidate_reader, first_plan, make_steering
from opus_jax.training.run_folder import open_run_folder
from opus_jax.training.state import TrainState

VOCABULARY = 280
SHORT = ("selection.method=random", "run.steps=4", "run.eval_every=2", "run.save_every=2")


class Place:
    """A folder with everything that a configuration can name. `{place.folder}` and the like stand in overrides."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_text(folder / "text")
        write_text(folder / "other")
        (folder / "other" / "prose" / "0.txt").write_text("another beginning, which no other folder has")
        self._write_records(folder / "records.jsonl")

    def config(self, *overrides: str) -> Config:
        return small_config(self.folder, *(item.format(place=self) for item in overrides))

    @functools.cached_property
    def finished_run(self) -> Path:
        """One of several runs that tests of other keys have trained."""
        return trained(self.config(*SHORT), self)

    @functools.cached_property
    def tokenizer(self) -> Path:
        """A trained model, of another size than the tests ask for."""
        folder = self.folder / "tokenizer"
        folder.mkdir()
        texts = [file.read_text() for file in sorted((self.folder / "other").rglob("*.txt"))]
        train_tokenizer(TokenizerConfig(vocab_size=310), texts, folder)
        return next(folder.glob("*.model"))

    @functools.cached_property
    def report(self) -> Path:
        return write_trained_pair(self.folder / "pair")

    @staticmethod
    def _write_records(file: Path) -> None:
        records = [
            {"text": f"{i} one", "body": f"{i} two", "domain": "ab"[i % 2], "kind": "xy"[i // 5]} for i in range(9)
        ]
        file.write_text("".join(json.dumps(record) + "\n" for record in records) + "{torn\n")


def or_refusal(observe: Any) -> Any:
    """The observation, or the message with which the configuration is refused."""

    @functools.wraps(observe)
    def observed(config: Config, place: Place) -> Any:
        try:
            return observe(config, place)
        except UserError as refusal:
            return str(refusal)

    return observed


# --------------------------------------------------------------------------------------------------- run


def folder_made(config: Config, place: Place) -> Any:
    assert config.run.dir is not None
    with open_run_folder(config.run.dir, config) as folder:
        return sorted(file.relative_to(place.folder).as_posix() for file in folder.iterdir())


def compiled_programs(config: Config, place: Place) -> Any:
    """Where they are kept."""
    before = jax.config.jax_compilation_cache_dir
    try:
        return str(keep_compiled_programs(config.run.compilation_cache, place.folder))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def skipped_too_often(config: Config, place: Place) -> Any:
    """How many updates may be left out."""
    run, loss = replace(config.run, on_nonfinite="skip"), {"loss": float("nan"), "grad_norm": 1.0}
    for count in range(1, 100):
        try:
            left_out_update(1, [], loss, count, run)
        except NonFiniteLossError:
            return count
    return None


def watched_seconds(config: Config, place: Place) -> Any:
    """What the watchdog of a run is told; nothing is trained."""

    class Seen(Exception):
        pass

    with tempfile.TemporaryDirectory() as folder:
        apart = replace(config, run=replace(config.run, dir=folder))
        with patch.object(loop, "Watchdog", side_effect=Seen) as watchdog, contextlib.suppress(Seen):
            loop.train(apart, progress=False)
    return watchdog.call_args.args[0]


@functools.cache
def _trained(mapping: str, place: Place) -> Path:
    config, folder = from_mapping(json.loads(mapping)), place.folder / "runs" / fingerprint(mapping)
    loop.train(replace(config, run=replace(config.run, dir=str(folder))), progress=False)
    return folder


def trained(config: Config, place: Place) -> Path:
    """The folder of a finished run; each configuration is trained once."""
    return _trained(json.dumps(config.to_mapping()), place)


def logged_steps(config: Config, place: Place) -> Any:
    return [line["step"] for line in lines(trained(config, place)) if "loss" in line]


def evaluated_steps(config: Config, place: Place) -> Any:
    return [line["step"] for line in lines(trained(config, place)) if "bits_per_byte" in line]


def saved_steps(config: Config, place: Place) -> Any:
    return sorted(f.name for f in (trained(config, place) / "checkpoints").iterdir() if f.name.isdigit())


def first_loss(config: Config, place: Place) -> Any:
    return lines(trained(config, place))[0]["loss"]


def selection_parts(config: Config, place: Place) -> Any:
    return sorted(file.name for file in (trained(config, place) / "selection").glob("*"))


# ---------------------------------------------------------------------------------- corpus and tokenizer


@or_refusal
def documents(config: Config, place: Place) -> Any:
    corpus = load_corpus(config.corpus)
    return {domain.name: [document.text for document in domain.documents()] for domain in corpus.domains}


def hub_documents(config: Config, place: Place) -> Any:
    """As `documents`, with a stand-in for the hub, whose text is the revision."""
    hub = types.ModuleType("datasets")
    hub.load_dataset = lambda *_, revision, **__: iter([{"text": f"at {revision}"}])  # type: ignore[attr-defined]
    with patch.dict("sys.modules", {"datasets": hub}):
        return documents(config, place)


def letters(texts: Sequence[str]) -> Any:
    """An embedder of one's own: how often each letter comes."""
    return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def records(config: Config, place: Place) -> Any:
    """The content of every prepared file, and what the two streams draw from."""
    manifest = Manifest.load(prepare(config, progress=False))
    content = {name: facts["sha256"] for name, facts in manifest.files.items()}
    weights = [plan(manifest, config).domain_weights.tolist() for plan in (initial_plan, proxy_plan)]
    return content, weights, manifest.row_tokens


def records_folder(config: Config, place: Place) -> Any:
    return prepare(config, progress=False).relative_to(place.folder).as_posix()


def processes(config: Config, place: Place) -> Any:
    """How many processes would tokenize; none for a single one."""
    asked: list[int] = []

    class Pool:
        def __init__(self, workers: int, *_: Any):
            asked.append(workers)
            raise tokenize_documents.BrokenProcessPool

    with tempfile.TemporaryDirectory() as cache:
        uncached = replace(config, corpus=replace(config.corpus, cache_dir=cache))
        with patch.object(tokenize_documents, "ProcessPoolExecutor", Pool), contextlib.suppress(UserError):
            prepare(uncached, progress=False)
    return asked


def engine(config: Config, place: Place) -> Any:
    """How many shards a cluster would be given; none without one."""
    asked: list[int] = []

    def cluster(task: Any, items: list[Any]) -> Any:
        asked.append(len(items))
        return map(task, items)

    with tempfile.TemporaryDirectory() as cache:
        uncached = replace(config, corpus=replace(config.corpus, cache_dir=cache))
        here = {"run_on_ray": cluster, "require_ray": lambda: None}  # Ray itself need not be there
        with patch.multiple(build_records, **here):
            prepare(uncached, progress=False)
    return asked


# ------------------------------------------------------------------------------------------------- model


def _spec(config: Config) -> Any:
    return resolve(config.model, VOCABULARY, config.corpus.row_tokens)


def shapes(config: Config, place: Place) -> Any:
    tree = jax.eval_shape(lambda: transformer.init(_spec(config), jax.random.key(0)))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def initialisation(config: Config, place: Place) -> Any:
    return jax.jit(lambda key: transformer.init(_spec(config), key)).lower(jax.random.key(0)).as_text()


def forward(config: Config, place: Place) -> Any:
    """The program of a forward pass."""
    spec = _spec(config)
    params = jax.eval_shape(lambda: transformer.init(spec, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((2, config.corpus.row_tokens), jnp.int32)
    return jax.jit(lambda p, t: transformer.apply(spec, p, t, t)).lower(params, ids).as_text()


# --------------------------------------------------------------------------------------------- optimizer


def updates(config: Config, place: Place) -> Any:
    """Rates of the whole run, and three updates of fixed gradients."""
    dice = np.random.default_rng(0)
    like: Any = {"blocks": {"map": {"kernel": (2, 3, 4)}, "norm": {"scale": (2, 3)}}, "head": {"kernel": (3, 5)}}

    def draw(scale: float) -> Any:
        leaf = lambda shape: jnp.asarray(scale * dice.normal(size=shape), jnp.float32)  # noqa: E731
        return jax.tree.map(leaf, like, is_leaf=lambda x: isinstance(x, tuple))

    params = draw(1.0)
    optimizer = make_optimizer(config.optimizer, config.run.steps, params)
    state, made = optimizer.transform.init(params), []
    for scale in (3.0, 1.0, 0.1):
        update, state = optimizer.transform.update(draw(scale), state, params)
        made += [leaf.tolist() for leaf in jax.tree.leaves(update)]
    return made, np.asarray(optimizer.schedule(np.arange(config.run.steps))).tolist()


# ----------------------------------------------------------------------------------- step and selection


def step(config: Config, place: Place) -> Any:
    """The program of the training step on one device."""
    return workshop(config, jax.devices()[:1]).train().program.as_text()


@or_refusal
def step_or_refusal(config: Config, place: Place) -> Any:
    """The program, or why there is none."""
    return step(config, place)


def rows_of_steps(config: Config, place: Place) -> Any:
    """How many rows each step takes."""
    return [buffers_of(config).rows(step) for step in range(config.run.steps)]


@or_refusal
def offered(config: Config, place: Place) -> Any:
    """The plans of a run whose scores depend on domain, document and chance, and what their rows would be."""
    records = prepare(config, progress=False)
    manifest, buffers, dice = Manifest.load(records), buffers_of(config), np.random.default_rng(0)
    reader = candidate_reader(records, manifest, config)
    first = first_plan(reader, records, manifest, config)
    steering = make_steering(first, reader, records, manifest, config, buffers, progress=False)
    seen = []
    for number in range(12):
        plan, end = steering.plan_at(number)
        rows = rows_at(plan, 0, buffers.slots_before(number), buffers.rows(number))
        read = batch_of(reader.read(rows))
        scores = read["domain_id"] + 0.1 * (read["document_ids"][:, 0] % 5) + dice.normal(size=len(rows))
        steering.record(number, scores, read)
        seen.append((plan.domain_weights.tolist(), end, rows.tolist()))
    return seen


def proxy_drawn(config: Config, place: Place) -> Any:
    """Different rows among the proxy's first hundred."""
    plan = proxy_plan(Manifest.load(prepare(config, progress=False)), config)
    return np.unique(rows_at(plan, 0, 0, 100)).tolist()


def audited_steps(config: Config, place: Place) -> Any:
    return [number for number in range(1, config.run.steps + 1) if loop._audited(config, number)]


def audited_candidates(config: Config, place: Place) -> Any:
    """How many candidates reach the oracle; the computations themselves are stood in for."""
    seen = []

    def oracle(losses: Any, params: Any, v: Any, rows: Any, *, chunk: int) -> Any:
        seen.append(len(rows["tokens"]))
        return jnp.zeros(len(rows["tokens"]))

    def ask(self: Any, v: Any, proxy_gradient: Any, key: Any, rows: Any) -> Any:
        return Scores(losses=None, utilities=jnp.zeros(len(rows["tokens"])))

    with (
        patch.object(audit.Chooser, "direction", lambda *_: (None, None, None)),
        patch.object(audit.Chooser, "ask", ask),
        patch.object(audit.per_example, "utilities", oracle),
    ):
        spec = _spec(config)
        run = audit.make_audit(spec, optimizer_for(spec, config), config, make_mesh(config.mesh))
        state = TrainState(jnp.int32(0), None, None, None, None, jax.random.key(0))
        run(state, {"tokens": jnp.zeros((config.candidates, 8), jnp.int32)}, {})
    return seen


# ---------------------------------------------------------------- evaluation, checkpoints, logs, reports


def _evaluator(config: Config, place: Place) -> Any:
    folder = prepare(config, progress=False)
    tokenizer = load_tokenizer(folder)
    reader = RowReader(folder, "validation")
    mesh, spec = make_mesh(config.mesh), resolve(config.model, tokenizer.vocab_size, config.corpus.row_tokens)
    return bits_per_byte.make_evaluator(
        spec, mesh, reader, Manifest.load(folder), tokenizer.token_bytes, config.evaluation
    )


def evaluated_rows(config: Config, place: Place) -> Any:
    return _evaluator(config, place).rows.tolist()


def evaluation_batch(config: Config, place: Place) -> Any:
    seen = []

    def losses(spec: Any, params: Any, batch: Any) -> Any:
        seen.append(batch["tokens"].shape)
        return batch["loss_mask"]

    with patch.object(bits_per_byte, "token_losses", losses):
        _evaluator(config, place)({})
    return seen


@or_refusal
def mesh(config: Config, place: Place) -> Any:
    return dict(make_mesh(config.mesh).shape)


def checkpoints_kept(config: Config, place: Place) -> Any:
    """After three saves, of which the first is the best."""
    with tempfile.TemporaryDirectory() as folder, loop._checkpoints(Path(folder), config) as checkpoints:
        for number, metric in ((1, 0.5), (2, 0.7), (3, 0.9)):
            checkpoints.save(number, {"x": jnp.ones(2)}, {}, {}, metric)
        checkpoints.wait()
        return checkpoints.steps()


def due_steps(config: Config, place: Place) -> Any:
    return [number for number in range(1, config.run.steps + 1) if loop._saved(config, number)]


def host_bytes(config: Config, place: Place) -> Any:
    """The limit that reaches Orbax."""
    with tempfile.TemporaryDirectory() as folder, loop._checkpoints(Path(folder), config) as checkpoints:
        return checkpoints._open()._context.memory.transfer_concurrent_bytes


@or_refusal
def trackers(config: Config, place: Place) -> Any:
    """The files of one logged line; optional packages count as absent."""
    folder = place.folder / f"logs-{fingerprint(config)}"
    with (
        patch.object(importlib.util, "find_spec", lambda _: None),
        MetricsWriter(folder, config.tracking) as writer,
    ):
        writer.write({"step": 1, "loss": 1.0})
    return sorted(file.name for file in folder.iterdir())


def report_texts(config: Config, place: Place) -> Any:
    page = write_report(place.report, settings=config.report).read_text()
    return re.findall(r"(?s)<article.*?</article>", page)
