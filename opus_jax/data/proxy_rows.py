"""Which rows of the proxy split stand for what the model should become good at."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from opus_jax.config import Config
from opus_jax.data.documents import require_known
from opus_jax.data.plan import Plan, fitted
from opus_jax.data.records import Manifest
from opus_jax.errors import UserError


def proxy_plan(manifest: Manifest, config: Config) -> Plan:
    """The plan of the proxy split: rows of `proxy.domains` (all domains if empty), each domain by its rows.

    The split's documents are never in the training rows.

    Raises:
      ConfigError: `proxy.domains` names an unknown domain.
      UserError: the chosen domains have no proxy rows.
    """
    require_known("proxy.domains", config.proxy.domains, manifest.domains)
    # Rows from files belong to no domain of the pool, and only proxy.domains were searched: all of them are wanted.
    chosen = config.proxy.domains if config.proxy.source == "heldout" else []
    counted = chosen or manifest.domains
    counts = np.array([manifest.rows["proxy"].get(name, 0) for name in manifest.domains], np.int64)
    weights = np.where(np.isin(manifest.domains, counted), counts, 0).astype(np.float64)
    if not weights.any():
        raise UserError(f"proxy.domains = {counted}: no proxy rows: {more_proxy_text(config)}")
    if config.proxy.limit is None:
        return fitted(Plan(weights), counts)
    domain, wanted = np.repeat(np.arange(len(counts)), counts), np.flatnonzero(np.repeat(weights > 0, counts))
    used = min(config.proxy.limit, len(wanted))
    repeats = np.bincount(wanted[np.arange(used) * len(wanted) // used], minlength=counts.sum()).astype(np.int32)
    used_weights = np.bincount(domain, repeats, len(counts)).astype(np.float64)
    return replace(fitted(Plan(used_weights), counts), row_repeats=repeats)


def proxy_row_indices(plan: Plan) -> Int[np.ndarray, " R"]:
    """Rows of the proxy split that its plan draws from, in order."""
    return np.concatenate(
        [np.unique(rows) for rows, w in zip(plan.domain_entries, plan.domain_weights, strict=True) if w]
    )


def more_proxy_text(config: Config) -> str:
    """What to do when the proxy has no rows."""
    proxy = config.proxy
    if proxy.source == "files":
        return f"give more text at proxy.path = {proxy.path}, or lower corpus.row_tokens"
    if proxy.source == "retrieved":
        return f"raise proxy.retrieved_share = {proxy.retrieved_share}, or lower corpus.row_tokens"
    share = config.corpus.proxy_share
    return f"give more documents there, raise corpus.proxy_share = {share}, or name other proxy.domains"


def target_domains(manifest: Manifest, config: Config) -> list[str]:
    """Domains whose validation text measures success: `proxy.domains`, or all that have any.

    Raises:
      ConfigError: one of them is unknown.
    """
    require_known("proxy.domains", config.proxy.domains, manifest.domains)
    return list(config.proxy.domains) or [name for name in manifest.domains if manifest.rows["validation"][name]]
