"""decisions/feedback-<step>.json: why the stream offers what it offers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from opus_jax.data.plan import Plan
from opus_jax.selection.bandit import BanditState
from opus_jax.selection.feedback import FeedbackState, Proposal, effective_counts, standard_errors
from opus_jax.training.steering import Controller, Describe

STOPPED_BELOW = 0.1  # of its first share: what the stream no longer offers
EXAMPLES = 32


def describe(domains: Sequence[str]) -> Describe:
    """A function that writes down a proposal: see docs/feedback.md for the fields."""

    def record(controller: Controller, proposal: Proposal, plan: Plan) -> dict[str, Any]:
        if isinstance(controller, BanditState):
            return _bandit(controller, proposal, plan, domains)
        assert isinstance(controller, FeedbackState)
        return _feedback(controller, proposal, plan, domains)

    return record


def _feedback(state: FeedbackState, proposal: Proposal, plan: Plan, domains: Sequence[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": "feedback", "domains": _domains(state, proposal, plan, domains)}
    if "cluster" in state.groups.levels:
        facts["clusters"] = _clusters(state, proposal, domains)
    if "document" in state.groups.levels:
        facts |= _documents(state, proposal, domains)
    return facts


def _domains(state: FeedbackState, proposal: Proposal, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    worths, sums = state.worths()[0], state.sums[0]
    columns = (proposal.weights, worths, standard_errors(sums), effective_counts(sums), _epochs(plan))
    keys = ("weight", "mean", "standard_error", "scores", "epochs")
    return {
        name: dict(zip(keys, map(float, values), strict=True)) for name, *values in zip(names, *columns, strict=False)
    }


def _clusters(state: FeedbackState, proposal: Proposal, domains: Sequence[str]) -> list[dict[str, Any]]:
    groups, level = state.groups, state.groups.levels.index("cluster")
    worths, sums = state.worths()[level], state.sums[level]
    cell = np.arange(len(worths)) if groups.levels[-1] == "cluster" else groups.parents[level + 1]
    share, base, rows = (
        np.bincount(cell, values, len(worths))
        for values in (proposal.record["shares"], proposal.record["base"], groups.unit_rows)
    )
    errors, counts = standard_errors(sums), effective_counts(sums)
    return [
        {
            "cluster": cluster, "label": label, "domain": domains[int(groups.parents[level][i])],
            "rows": float(rows[i]), "mean": float(worths[i]), "standard_error": float(errors[i]),
            "scores": float(counts[i]), "share": float(share[i]), "base_share": float(base[i]),
        }
        for i, (cluster, label) in enumerate(groups.labels)
    ]  # fmt: skip


def _documents(state: FeedbackState, proposal: Proposal, domains: Sequence[str]) -> dict[str, Any]:
    share, base, rows = proposal.record["shares"], proposal.record["base"], state.groups.unit_rows
    ratio = np.divide(share, base, out=np.full(len(share), np.inf), where=base > 0)
    order = np.argsort(-ratio, kind="stable")
    top = order[(base[order] > 0) & (np.cumsum(rows[order]) <= 0.1 * rows.sum())]
    fallen = np.argsort(ratio, kind="stable")[:EXAMPLES]
    return {
        "documents": {
            "scored": int((state.sums[-1][:, 0] > 0).sum()),
            "share_top_tenth": float(share[top].sum()),
            "stopped": int((ratio < STOPPED_BELOW).sum()),
        },
        "stopped_examples": [
            {"document_id": int(i), "domain": domains[int(state.groups.unit_domain[i])], "share_ratio": float(ratio[i])}
            for i in fallen
            if np.isfinite(ratio[i]) and ratio[i] < 1
        ],
    }


def _bandit(state: BanditState, proposal: Proposal, plan: Plan, names: Sequence[str]) -> dict[str, Any]:
    """A bandit's rewards have no error bars."""
    columns = zip(names, proposal.weights, state.rewards, _epochs(plan), strict=False)
    domains = {
        name: {"weight": float(weight), "mean": float(reward), "epochs": float(epochs)}
        for name, weight, reward, epochs in columns
    }
    return {"kind": "odm", "domains": domains}


def _epochs(plan: Plan) -> np.ndarray:
    """float64[G]: passes over each domain before the plan."""
    return plan.drawn / np.maximum(plan.domain_rows, 1)
