"""What the candidate stream offers: the rows it reads, the first plan, and what steers the later ones."""

from pathlib import Path

import numpy as np

from opus_jax.config import Config, FeedbackConfig
from opus_jax.data.buffers import Buffers
from opus_jax.data.clusters import document_clusters
from opus_jax.data.importance import dsir_documents
from opus_jax.data.joined_reader import WithProxyRows
from opus_jax.data.plan import Plan, advance, fitted, initial_plan
from opus_jax.data.proxy_rows import proxy_plan, proxy_row_indices
from opus_jax.data.records import Manifest, RowReader
from opus_jax.errors import ConfigError
from opus_jax.selection import bandit, feedback
from opus_jax.selection.groups import Groups, nested_groups
from opus_jax.training.steering import Controller, Steering

Reader = RowReader | WithProxyRows


def candidate_reader(records: Path, manifest: Manifest, config: Config) -> Reader:
    """The training rows, and behind them the proxy rows where these shall be trained on too."""
    lenient = config.corpus.lenient
    train = RowReader(records, "train", lenient=lenient)
    if not config.plan.proxy_rows_share:
        return train
    rows = proxy_row_indices(proxy_plan(manifest, config))
    return WithProxyRows(train, RowReader(records, "proxy", lenient=lenient), rows)


def first_plan(reader: Reader, records: Path, manifest: Manifest, config: Config) -> Plan:
    """The plan of step 0: `corpus.weights`, then `plan.importance`, then `plan.proxy_rows_share`.

    Raises:
      ConfigError, UserError: see `initial_plan`; importance keeps nothing.
    """
    plan = initial_plan(manifest, config)
    if config.plan.importance == "dsir":
        plan = _resampled(plan, reader, records, manifest, config)
    share = config.plan.proxy_rows_share
    if not share:
        return plan
    rows = len(reader) - int(plan.domain_rows.sum())
    weights = np.append((1 - share) * plan.domain_weights / plan.domain_weights.sum(), share)
    joined = fitted(Plan(weights), np.append(plan.domain_rows, rows))
    if plan.priorities is None:
        return joined
    priorities = np.where(_held_out(reader, len(plan.priorities), rows), 1.0, plan.priorities)
    return advance(joined, 0, priorities=priorities, row_documents=reader.row_documents)


def make_steering(
    plan: Plan, reader: Reader, records: Path, manifest: Manifest, config: Config, buffers: Buffers, *, progress: bool
) -> Steering:
    """The first plan and, with `feedback.enabled`, what makes the following ones.

    Raises:
      ConfigError: the floor or the limit on passes cannot be kept with this corpus.
    """
    settings, steps = config.feedback, config.run.steps
    if not settings.enabled:
        return Steering(plan, buffers, steps)
    controller: Controller
    if settings.signal == "odm":
        controller = bandit.start(feedback.domain_groups(plan.domain_rows), plan.domain_weights, settings)
        return Steering(plan, buffers, steps, controller, settings.window_steps)
    groups = _groups(plan, reader, records, manifest, config, progress)
    controller = feedback.start(groups, plan.domain_weights, settings, plan.priorities)
    _check_passes(plan, buffers.slots_before(steps), settings)
    return Steering(plan, buffers, steps, controller, settings.window_steps, reader.row_documents)


def _groups(plan: Plan, reader: Reader, records: Path, manifest: Manifest, config: Config, progress: bool) -> Groups:
    clusters: np.ndarray | None = None
    labels: list[str] = []
    if "cluster" in config.feedback.groups:
        clusters, labels = document_clusters(
            records, config.feedback.clusters, config.proxy.embedder, progress=progress
        )
    documents = manifest.total_documents()
    return nested_groups(config.feedback.groups, plan.domain_rows, reader.row_documents, documents, clusters, labels)


def _check_passes(plan: Plan, slots: int, settings: FeedbackConfig) -> None:
    rows = int(plan.domain_rows[plan.domain_weights > 0].sum())
    if settings.max_epochs is not None and slots > settings.max_epochs * rows:
        raise ConfigError(
            "feedback.max_epochs", settings.max_epochs,
            f"the run draws {slots} rows from {rows}: must be at least {slots / rows:.3g}, or null",
        )  # fmt: skip


def _resampled(plan: Plan, reader: Reader, records: Path, manifest: Manifest, config: Config) -> Plan:
    """The plan over the documents that DSIR keeps; a domain keeps its share as far as it keeps its rows."""
    kept = dsir_documents(records, manifest, config, seed=config.run.seed)
    documents = np.asarray(reader.row_documents)[: int(plan.domain_rows.sum())]
    present = documents >= 0
    of_rows = np.where(present, kept[documents], 0).sum(1) / present.sum(1)
    domain = np.repeat(np.arange(len(plan.domain_rows)), plan.domain_rows)
    share_kept = np.bincount(domain, of_rows, len(plan.domain_rows)) / np.maximum(plan.domain_rows, 1)
    weights = plan.domain_weights / plan.domain_weights.sum() * share_kept
    if not weights.any():
        raise ConfigError("plan.keep", config.plan.keep, "keeps no document of a domain in the pool: raise it")
    return advance(plan, 0, weights=weights, priorities=kept, row_documents=documents)


def _held_out(reader: Reader, documents: int, rows: int) -> np.ndarray:
    """bool[documents]: those of the last rows."""
    ids = np.asarray(reader.row_documents)[len(reader) - rows :]
    held_out = np.zeros(documents, bool)
    held_out[ids[ids >= 0]] = True
    return held_out
