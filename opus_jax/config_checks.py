"""Which values a configuration may have: checked when it is made, before anything is read or compiled."""

import re
from typing import Any

from opus_jax.errors import ConfigError

Config = Any  # opus_jax.config.Config, which imports this

_CHOICES = {
    "run.on_nonfinite": ("stop", "skip"),
    "corpus.name": ("python-env", "debian", "local", "hf", "records"),
    "corpus.domain_by": ("folder", "file", "field"),
    "prepare.engine": ("local", "ray"),
    "tokenizer.kind": ("sentencepiece", "byte"),
    "model.norm": ("prenorm", "prenorm_qk", "simplenorm", None),
    "model.norm_kind": ("rmsnorm", "layernorm", None),
    "model.qk_norm_axis": ("full", "head", None),
    "model.activation": ("gelu", "swiglu", None),
    "model.positions": ("rope", "learned", None),
    "model.init": ("fan_in", "official"),
    "model.remat": ("none", "full", "dots"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.dtype": ("float32", "bfloat16", None),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("constant", "cosine", "linear", "wsd"),
    "selection.method": ("opus", "paper", "greats", "high_loss", "mid_loss", "random", "none"),
    "selection.unit": ("row", "document"),
    "selection.dtype": ("float32", "bfloat16", None),
    "selection.engine": ("directional", "ghost", "per_example"),
    "selection.sketch": ("kron", "count", "tensor", None),
    "selection.preconditioner": ("exact", "factored"),
    "selection.kernel": ("xla", "pallas", None),
    "selection.derivative": ("jvp", "difference"),
    "selection.parameters": ("all", "blocks", "top_half", "top_quarter"),
    "selection.window_place": ("prefix", "random"),
    "selection.direction": ("vjp", "adamw_frozen", "muon_frozen", "identity"),
    "proxy.source": ("heldout", "files", "retrieved"),
    "plan.importance": ("dsir", None),
    "feedback.signal": ("utility", "odm"),
}

_AT_LEAST = {
    "run.seed": 0, "run.steps": 1, "run.eval_every": 1, "run.save_every": 1, "run.log_every": 1,
    "run.max_skipped": 0, "checkpoint.temporary_every": 1,
    "corpus.row_tokens": 8, "corpus.max_bytes": 1, "corpus.workers": 1,
    "tokenizer.vocab_size": 260,
    "model.layers": 1, "model.width": 1, "model.hidden": 1, "model.heads": 1, "model.kv_heads": 1,
    "model.head_dim": 1, "model.vocab_size": 2, "model.max_length": 1,
    "optimizer.learning_rate": 0.0, "optimizer.adam_learning_rate": 0.0, "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.0,
    "batch.rows": 1, "batch.microbatch": 1,
    "selection.temperature": 0.0, "selection.window": 2, "selection.score_chunk": 1,
    "selection.rank": 1, "selection.sketch_width": 1,
    "selection.redundancy": 0.0, "selection.redundancy_rounds": 1, "selection.select_every": 1,
    "selection.warm_start_steps": 0, "selection.audit_every": 0, "selection.audit_rows": 3,
    "proxy.limit": 1, "proxy.rows": 1, "proxy.window": 2, "proxy.refresh": 1,
    "evaluation.rows": 1, "evaluation.batch_rows": 1,
    "feedback.window_steps": 1, "feedback.clusters": 1, "feedback.shrinkage": 0.0, "feedback.floor": 0.0,
    "mesh.replica": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "checkpoint.keep": 1, "report.examples": 1,
}  # fmt: skip

_POSITIVE = (
    "run.watchdog_seconds",
    "checkpoint.host_gigabytes",
    "model.norm_eps",
    "model.rope_theta",
    "optimizer.eps",
    "optimizer.clip",
    "selection.max_overhead",
    "feedback.temperature",
    "feedback.max_epochs",
)
_SHARE_BELOW_1 = ("optimizer.beta1", "optimizer.beta2", "optimizer.momentum", "proxy.ema", "plan.proxy_rows_share")
_SHARE = ("optimizer.decay_share", "optimizer.final_share", "feedback.decay")
_SHARE_ABOVE_0 = ("selection.ratio", "plan.keep")


_LOGIN = re.compile(r"(?i)://[^/@\s]*:[^/@\s]*@|[?&;][\w.-]*(?:key|token|secret|pass|cred|auth|sig)[\w.-]*=")

KRON_BLOCK = 32 * 32  # numbers in one block of a Kron sketch


def check(config: Config) -> None:
    """Refuse values that no run could have, alone or together.

    Raises:
      ConfigError: naming the key, its value and what is allowed.
    """
    for key, allowed in _CHOICES.items():
        names = [str(a) if a is not None else "null" for a in allowed]
        _require(config, key, lambda x, ok=allowed: x in ok, f"must be one of {', '.join(names)}")
    for key, least in _AT_LEAST.items():
        _require(config, key, lambda x, low=least: x is None or x >= low, f"must be at least {least}")
    for key in _POSITIVE:
        _require(config, key, lambda x: x is None or x > 0, "must be above 0")
    for key in _SHARE_BELOW_1:
        _require(config, key, lambda x: 0 <= x < 1, "must be at least 0 and below 1")
    for key in _SHARE:
        _require(config, key, lambda x: 0 <= x <= 1, "must lie between 0 and 1")
    for key in _SHARE_ABOVE_0:
        _require(config, key, lambda x: 0 < x <= 1, "must be above 0 and at most 1")
    _require(config, "proxy.retrieved_share", lambda x: 0 < x < 0.5, "must be above 0 and below 0.5")
    _require(config, "selection.entropy", lambda x: x is None or 0 < x <= 1, "must be above 0 and at most 1, or null")
    _require(config, "mesh.data", lambda x: x >= 1 or x == -1, "must be at least 1, or -1 for all remaining devices")
    for key in ("corpus.validation_share", "corpus.proxy_share"):
        _require(config, key, lambda x: 0 < x < 0.5, "must be above 0 and below 0.5")
    _check_addresses(config)
    _check_corpus(config)
    _check_direction(config)
    _check_batch(config)
    _check_redundancy(config)
    _check_rank(config)
    _check_budget(config)
    _check_sketch(config)
    _check_shared(config)
    _check_documents(config)
    _check_feedback(config)


def _check_corpus(config: Config) -> None:
    corpus = config.corpus
    if corpus.name in ("local", "hf", "records") and not corpus.path:
        raise ConfigError("corpus.path", corpus.path, f"corpus.name = {corpus.name} needs a path")
    if corpus.name == "hf" and not corpus.revision:
        raise ConfigError(
            "corpus.revision", corpus.revision, "corpus.name = hf needs a pinned revision (a commit hash)"
        )
    for domain, weight in corpus.weights.items():
        if weight < 0:
            raise ConfigError(f"corpus.weights.{domain}", weight, "must be at least 0")
    if corpus.weights and not any(corpus.weights.values()):
        raise ConfigError("corpus.weights", corpus.weights, "at least one weight must be above 0")
    _check_given_records(config)
    if config.proxy.source != "heldout" and not config.proxy.path:
        raise ConfigError("proxy.path", None, f"proxy.source = {config.proxy.source} needs a file or folder")


def _check_given_records(config: Config) -> None:
    """What a prepared corpus has been made with cannot be asked for again."""
    if config.corpus.name != "records":
        return
    made: dict[str, tuple[Any, Any, str]] = {
        "corpus.domains": (config.corpus.domains, None, "null"), "corpus.noise": (dict(config.corpus.noise), {}, "{}"),
        "corpus.max_bytes": (config.corpus.max_bytes, None, "null"),
        "proxy.source": (config.proxy.source, "heldout", "heldout"),
    }  # fmt: skip
    for key, (value, needed, shown) in made.items():
        if value != needed:
            raise ConfigError(key, value, f"corpus.name = records has been prepared already: set it to {shown}")


def _check_addresses(config: Config) -> None:
    """Refuse logins in addresses: a configuration is written into the run folder and its report."""
    sections = {name: vars(section) for name, section in vars(config).items()}
    for section, values in sections.items():
        for name, value in values.items():
            if isinstance(value, str) and "://" in value and _LOGIN.search(value):
                allowed = "the address holds a login; take it out, and give it as the service's own tools do"
                raise ConfigError(f"{section}.{name}", f"{value.split('://')[0]}://<redacted>", allowed)


def _check_direction(config: Config) -> None:
    direction, name = config.selection.direction, config.optimizer.name
    if direction in ("adamw_frozen", "muon_frozen") and direction != f"{name}_frozen":
        raise ConfigError(
            "selection.direction", direction, f"with optimizer.name = {name} must be vjp, {name}_frozen or identity"
        )


def _check_batch(config: Config) -> None:
    rows, micro, candidates = config.batch.rows, config.batch.microbatch, config.candidates
    if micro is not None and rows % micro:
        raise ConfigError("batch.microbatch", micro, f"must divide batch.rows = {rows}")
    if micro is not None and config.proxy.rows > micro and config.proxy.rows % micro:
        raise ConfigError(
            "batch.microbatch", micro, f"must divide proxy.rows = {config.proxy.rows} or be at least that"
        )
    chunk = config.selection.score_chunk
    if chunk is not None and candidates % chunk:
        raise ConfigError(
            "selection.score_chunk", chunk, f"must divide the {candidates} candidates (batch.rows / selection.ratio)"
        )
    for key, window in (("selection.window", config.selection.window), ("proxy.window", config.proxy.window)):
        if window is not None and window > config.corpus.row_tokens:
            raise ConfigError(key, window, f"must be at most corpus.row_tokens = {config.corpus.row_tokens}")
    if config.selection.audit_every and config.selection.audit_rows > candidates:
        raise ConfigError(
            "selection.audit_rows", config.selection.audit_rows, f"must be at most the {candidates} candidates"
        )


def _check_redundancy(config: Config) -> None:
    selection = config.selection
    if not selection.redundancy:
        return
    if selection.method != "opus":
        raise ConfigError(
            "selection.redundancy", selection.redundancy, "belongs to selection.method = opus; set it to 0"
        )
    if selection.engine == "ghost" and selection.sketch is None and selection.score_chunk is not None:
        allowed = "exact products are of all candidates at once: set it to null, or selection.sketch=kron"
        raise ConfigError("selection.score_chunk", selection.score_chunk, f"with selection.redundancy {allowed}")
    if selection.engine == "directional" and config.batch.rows % selection.redundancy_rounds:
        raise ConfigError(
            "selection.redundancy_rounds", selection.redundancy_rounds, f"must divide batch.rows = {config.batch.rows}"
        )


def _check_rank(config: Config) -> None:
    selection = config.selection
    if selection.rank is None:
        return
    key, rank = "selection.rank", selection.rank
    if selection.method != "opus":
        raise ConfigError(key, rank, "belongs to selection.method = opus; set it to null")
    if selection.engine != "directional":
        allowed = f"the {selection.engine} engine costs the same at any rank; set it to null, or engine=directional"
        raise ConfigError(key, rank, allowed)
    if selection.derivative != "jvp":
        allowed = "central differences cost the same at any rank; set it to null, or selection.derivative=jvp"
        raise ConfigError(key, rank, allowed)


def _check_budget(config: Config) -> None:
    """A budget picks among settings of the directional engine."""
    selection = config.selection
    if selection.max_overhead is None:
        return
    needed = {"selection.method": "opus", "selection.engine": "directional", "selection.rank": None}
    _require_with(config, "selection.max_overhead", needed, without="null")


def _check_sketch(config: Config) -> None:
    selection = config.selection
    if selection.sketch is None:
        if selection.sketched_utilities:
            raise ConfigError("selection.sketched_utilities", True, "needs a selection.sketch: kron, count or tensor")
        if selection.method == "greats" and selection.engine != "per_example" and selection.score_chunk is not None:
            allowed = "exact products are of all candidates at once: set it to null, or selection.sketch=kron"
            raise ConfigError(
                "selection.score_chunk", selection.score_chunk, f"with selection.method = greats {allowed}"
            )
        return
    if selection.engine == "directional" and selection.method == "opus":
        allowed = "the directional engine has no sketches: set it to null, or selection.engine=ghost"
        raise ConfigError("selection.sketch", selection.sketch, allowed)
    if selection.sketch == "kron" and selection.sketch_width % KRON_BLOCK:
        raise ConfigError(
            "selection.sketch_width", selection.sketch_width, f"must be a multiple of {KRON_BLOCK} for kron"
        )
    if selection.sketch == "tensor" and selection.preconditioner == "exact" and config.optimizer.name == "adamw":
        allowed = "must be factored for selection.sketch = tensor, which has no elementwise preconditioner"
        raise ConfigError("selection.preconditioner", "exact", allowed)
    if selection.sketched_utilities and selection.redundancy and selection.direction == "vjp":
        allowed = f"with sketched_utilities and redundancy must be {config.optimizer.name}_frozen or identity"
        raise ConfigError("selection.direction", "vjp", f"{allowed}: one sketch serves both in a frozen metric")


def _check_shared(config: Config) -> None:
    """The scoring pass can serve the update only where it is a pass over whole rows, at the update's precision."""
    selection = config.selection
    if not selection.shared:
        return
    needed: dict[str, Any] = {
        "selection.method": "opus", "selection.engine": "ghost", "selection.unit": "row",
        "selection.parameters": "all", "selection.window": None, "selection.dtype": None,
        "selection.score_chunk": None, "batch.microbatch": None,
    }  # fmt: skip
    _require_with(config, "selection.shared", needed, without="false")


def _check_documents(config: Config) -> None:
    selection = config.selection
    if selection.unit != "document":
        return
    unfit = {
        "selection.method": (selection.method, "opus"),
        "selection.engine": (selection.engine, "directional"),
        "selection.redundancy": (selection.redundancy, 0.0),
    }
    for key, (value, needed) in unfit.items():
        if value != needed:
            raise ConfigError(key, value, f"selection.unit = document needs {needed}; or set selection.unit=row")
    if selection.temperature == float("inf") and selection.entropy is None:
        allowed = "selection.unit = document ranks rows by utility, which is not random; set selection.unit=row"
        raise ConfigError("selection.temperature", selection.temperature, allowed)


def _check_feedback(config: Config) -> None:
    feedback, method = config.feedback, config.selection.method
    known = ("domain", "cluster", "document")
    if not feedback.groups or list(feedback.groups) != [name for name in known if name in feedback.groups]:
        raise ConfigError("feedback.groups", feedback.groups, f"must be some of {', '.join(known)}, in this order")
    if not feedback.enabled:
        return
    if config.plan.proxy_rows_share:
        raise ConfigError(
            "plan.proxy_rows_share", config.plan.proxy_rows_share, "must be 0 with feedback.enabled: it is a control"
        )
    if feedback.signal == "utility" and method in ("random", "none"):
        raise ConfigError(
            "feedback.enabled", True, f"selection.method = {method} scores nothing: use opus with temperature=.inf"
        )
    if feedback.signal == "odm" and list(feedback.groups) != ["domain"]:
        raise ConfigError("feedback.groups", feedback.groups, "feedback.signal = odm knows domains only: [domain]")


def _require_with(config: Config, setting: str, needed: dict[str, Any], *, without: str) -> None:
    """Values that a setting needs, or it must be given up."""
    for key, value in needed.items():
        shown = "null" if value is None else value
        _require(
            config, key, lambda x, ok=value: x == ok, f"must be {shown} with {setting}; or set {setting}={without}"
        )


def _require(config: Config, key: str, holds: Any, allowed: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    if not holds(value):
        raise ConfigError(key, value, allowed)
