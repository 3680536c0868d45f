"""Configuration: frozen dataclasses, read from YAML with dotted overrides.

Every key is documented beside its default. An unknown key, a wrong type or an impossible value is a
`ConfigError` that names the key, the value and what is allowed; it is raised before anything is compiled.
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opus_jax.config_checks import check
from opus_jax.errors import ConfigError, UserError


@dataclass(frozen=True)
class RunConfig:
    dir: Optional[str] = None  # run folder; null = runs/<config file name>
    seed: int = 0  # initial weights, candidate order, selection noise
    steps: int = 300  # optimizer updates
    eval_every: int = 100  # steps between evaluations; the last step is always evaluated
    save_every: int = 100  # steps between checkpoints; the last step is always saved
    log_every: int = 1  # steps between lines of metrics.jsonl
    compilation_cache: Optional[str] = "auto"  # folder of compiled programs; auto = in the cache, but not on CPUs
    on_nonfinite: str = "stop"  # stop | skip: what a loss or gradient that is not finite does (skip = no update)
    max_skipped: int = 10  # skip: updates left out at most, in the whole run
    watchdog_seconds: Optional[float] = 1800.0  # a step that takes longer ends the process; null = off


@dataclass(frozen=True)
class CorpusConfig:
    name: str = "python-env"  # python-env | debian | local | hf | records (prepared already, at path)
    path: Optional[str] = None  # local, records: file or folder, or its address (gs://, s3://); hf: dataset name
    domain_by: str = "folder"  # local: folder | file | field
    domain_field: str = "domain"  # local, hf: record field that names the domain when domain_by = field
    text_field: str = "text"  # local, hf: record field that holds the text
    revision: Optional[str] = None  # hf: the pinned revision (required)
    domains: Optional[list[str]] = None  # keep only these; null = all
    weights: dict[str, float] = field(default_factory=dict)  # share of candidates by domain; empty = by rows
    noise: dict[str, str] = field(default_factory=dict)  # domain -> transform:share, for example web: shuffle:0.5
    row_tokens: int = 256  # tokens in a candidate row
    max_bytes: Optional[int] = None  # cap on each domain's UTF-8 bytes; null = all
    validation_share: float = 0.05  # of documents, by hash
    proxy_share: float = 0.05  # of documents, by hash
    strict: bool = False  # a malformed line is an error instead of a count
    lenient: bool = False  # a damaged record or missing shard is a row without text, and a count, instead of an error
    workers: Optional[int] = None  # processes that tokenize; null = one per core
    cache_dir: Optional[str] = None  # null = $OPUS_JAX_CACHE or ~/.cache/opus_jax


@dataclass(frozen=True)
class PrepareConfig:
    engine: str = "local"  # local (processes of this machine) | ray (a Ray cluster): what tokenizes the corpus


@dataclass(frozen=True)
class TokenizerConfig:
    kind: str = "sentencepiece"  # sentencepiece | byte
    path: Optional[str] = None  # a trained .model; null = train on the corpus
    vocab_size: int = 2048  # of a tokenizer trained here


@dataclass(frozen=True)
class ModelConfig:
    preset: Optional[str] = None  # a name from models/presets.py; the keys below override it when not null
    norm: Optional[str] = None  # prenorm | prenorm_qk | simplenorm
    norm_kind: Optional[str] = None  # rmsnorm | layernorm
    qk_norm_axis: Optional[str] = None  # full | head: width over which queries and keys are normalised
    norm_eps: Optional[float] = None
    layers: Optional[int] = None
    width: Optional[int] = None
    hidden: Optional[int] = None  # width of the MLP
    heads: Optional[int] = None
    kv_heads: Optional[int] = None  # fewer than heads = grouped-query attention
    head_dim: Optional[int] = None  # null = width / heads
    vocab_size: Optional[int] = None  # null = the tokenizer's
    activation: Optional[str] = None  # gelu | swiglu
    positions: Optional[str] = None  # rope | learned
    rope_theta: Optional[float] = None
    max_length: Optional[int] = None  # learned positions: their number; null = corpus.row_tokens
    tied: Optional[bool] = None  # head shares the embedding
    bias: Optional[bool] = None  # linear maps have a bias
    init: str = "fan_in"  # fan_in | official (0.02, depth-scaled)
    remat: str = "none"  # none | full | dots: what the backward pass recomputes
    attention: str = "auto"  # auto | xla | cudnn (GPU, bfloat16; scoring by forward mode keeps xla): of training
    dtype: Optional[str] = None  # compute type; null = bfloat16 on accelerators, float32 on CPU
    init_from: Optional[str] = None  # a run folder whose newest checkpoint gives the first weights


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | muon
    learning_rate: float = 3e-3
    adam_learning_rate: Optional[float] = None  # muon: rate of the leaves Muon leaves to AdamW; null = learning_rate
    schedule: str = "cosine"  # constant | cosine | linear | wsd
    warmup_steps: int = 20
    decay_share: float = 0.2  # wsd: share of the steps spent decaying
    final_share: float = 0.1  # last rate / peak rate
    weight_decay: float = 0.1
    decay_all: bool = False  # also decay gains, biases and norms (the official SimpleGPT setting)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # muon
    clip: Optional[float] = 1.0  # global gradient norm; null = off


@dataclass(frozen=True)
class BatchConfig:
    rows: int = 16  # K, rows of one update over all devices
    microbatch: Optional[int] = None  # rows per gradient accumulation step; null = all at once


@dataclass(frozen=True)
class SelectionConfig:
    method: str = "opus"  # opus | paper | greats | high_loss | mid_loss | random | none
    ratio: float = 0.5  # K / N: share of the candidate buffer that is trained on
    temperature: float = 0.5  # on z-scores; 0 = top-k, .inf = score only, choose at random
    entropy: Optional[float] = None  # instead of a temperature: entropy of the first draw, as a share of log N
    unit: str = "row"  # row | document: document = kept rows are trained on their chosen documents only
    redundancy: float = 0.0  # lambda, penalty on what the chosen rows have in common; 0 = off, 1 = the full step
    redundancy_rounds: int = 4  # directional engine: rounds of picks, rescored in between
    engine: str = "directional"  # directional | ghost | per_example
    sketch: Optional[str] = None  # kron | count | tensor: of gradients, for what rows have in common; null = exact
    sketch_width: int = 4096  # numbers of a sketch, for each matrix
    sketched_utilities: bool = False  # utilities out of the sketches too, instead of exact ones
    preconditioner: str = "exact"  # exact | factored (AdamW's second moments at rank 1, cheaper): inside sketches
    kernel: Optional[str] = None  # xla | pallas (TPU): of sketches; null = by the platform
    shared: bool = False  # ghost: the update takes the chosen rows' gradient from the scoring pass
    derivative: str = "jvp"  # jvp (exact) | difference (cheaper, approximate): of the directional engine
    direction: str = "vjp"  # vjp | adamw_frozen | muon_frozen | identity
    parameters: str = "all"  # all | blocks | top_half | top_quarter: along which parameters utilities are taken
    rank: Optional[int] = None  # directional jvp: each matrix of the direction at this rank, cheaper; null = whole
    dtype: Optional[str] = None  # compute type of scoring: float32 | bfloat16; null = the model's
    window: Optional[int] = None  # score only so many tokens of a row; null = the whole row
    window_place: str = "prefix"  # prefix | random: where in the row the window lies
    score_chunk: Optional[int] = None  # candidates at once; null = all. per_example: parameters x 8 bytes for each
    warm_start_steps: int = 20  # first steps choose at random
    select_every: int = 1  # steps between scorings; steps in between train on fresh rows of the stream
    max_overhead: Optional[float] = None  # share of training's FLOPs that scoring is made to fit in; null = as set
    audit_every: int = 100  # steps between checks against exact per-example gradients; 0 = off
    audit_rows: int = 8  # candidates in one check


@dataclass(frozen=True)
class ProxyConfig:
    source: str = "heldout"  # heldout (the proxy split of proxy.domains) | files (proxy.path) | retrieved
    domains: list[str] = field(default_factory=list)  # empty = every domain (heldout)
    path: Optional[str] = None  # text, JSONL or Parquet: files: the proxy itself; retrieved: what it shall be like
    retrieved_share: float = 0.01  # retrieved: share of the corpus's bytes taken as proxy
    embedder: str = "hashing"  # retrieved, clusters: hashing (built in) | package.module:function
    limit: Optional[int] = None  # rows of the proxy that are used at all, spread over it; null = all
    rows: int = 16  # proxy rows per refresh
    window: Optional[int] = None  # their first tokens, which the proxy gradient is taken over; null = the whole row
    refresh: int = 1  # scored steps between fresh proxy gradients
    ema: float = 0.0  # weight of the past in the proxy gradient; 0 = the fresh one only


@dataclass(frozen=True)
class PlanConfig:
    importance: Optional[str] = None  # dsir: keep the documents most like the proxy by hashed n-grams (a rival)
    keep: float = 0.5  # dsir: share of the training text kept
    proxy_rows_share: float = 0.0  # share of the stream given to the proxy rows themselves (a rival)


@dataclass(frozen=True)
class FeedbackConfig:
    enabled: bool = False  # let scores decide what the stream offers
    signal: str = "utility"  # utility (scores of candidates) | odm (losses of trained rows, a domain bandit; a rival)
    window_steps: int = 50  # steps of a plan; scores of window w - 1 and before decide the plan of window w + 1
    groups: list[str] = field(default_factory=lambda: ["domain", "cluster", "document"])  # coarse to fine
    clusters: int = 64  # of the embedded documents
    temperature: float = 0.15  # of the plan, on estimated z-scores; smaller = sharper
    shrinkage: Optional[float] = None  # scores that a group's parent counts for; null = estimated from the scores
    decay: float = 0.95  # weight of earlier windows, per window
    floor: float = 0.01  # least share of every domain with rows
    max_epochs: Optional[float] = 4.0  # passes over a domain that the run may reach; null = any
    shuffle: bool = False  # a control: scores are dealt out anew among the candidates of a buffer


@dataclass(frozen=True)
class EvaluationConfig:
    domains: Optional[list[str]] = None  # measure only these, the target's among them; null = all
    rows: int = 64  # validation rows per domain, at most
    batch_rows: int = 32


@dataclass(frozen=True)
class MeshConfig:
    replica: int = 1
    data: int = -1  # -1 = all remaining devices
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    keep: int = 2  # newest checkpoints kept
    best: bool = True  # also keep the one with the lowest target bits per byte
    temporary_every: Optional[int] = None  # steps between checkpoints that go with the next; null = none
    host_gigabytes: Optional[float] = None  # host memory that saving may fill; steps wait meanwhile. null = no limit


@dataclass(frozen=True)
class TrackingConfig:
    tensorboard: bool = True
    wandb: Optional[str] = None  # project name; needs the package wandb
    trackio: Optional[str] = None  # project name; needs the package trackio
    selection_log: bool = True  # write selection/*.parquet


@dataclass(frozen=True)
class ReportConfig:
    texts: bool = True  # show the highest- and lowest-utility texts
    examples: int = 8  # of each


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> "Config":
        """Read a YAML file, or the config.yaml of a run folder, and apply `key.sub=value` overrides.

        Raises:
          ConfigError: a key is unknown, of the wrong type, or of an impossible value.
          UserError: the file is absent or is not YAML.
        """
        path = Path(path)
        file = path / "config.yaml" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"no configuration at {file}: give a YAML file (see configs/) or a run folder")
        config = from_mapping(_read_yaml(file), overrides)
        if config.run.dir is None:
            name = path.name if path.is_dir() else path.stem
            config = replace(config, run=replace(config.run, dir=str(Path("runs") / name)))
        return config

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, file: str | Path) -> None:
        Path(file).write_text(OmegaConf.to_yaml(OmegaConf.create(self.to_mapping())))

    @property
    def candidates(self) -> int:
        """N: rows in the candidate buffer of one step. Method `none` trains on every row it reads."""
        if self.selection.method == "none":
            return self.batch.rows
        return round(self.batch.rows / self.selection.ratio)


replace = dataclasses.replace


def from_mapping(mapping: dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Build a checked Config from nested dictionaries and dotted overrides."""
    schema = OmegaConf.structured(Config)
    _unlock(schema)
    for item in overrides:
        if "=" not in item:
            raise UserError(f"override {item!r} is not of the form key.sub=value")
    layers = [OmegaConf.create(mapping), _read_overrides(overrides)]
    for layer in layers:
        _reject_unknown(OmegaConf.to_container(layer), Config, "")
        _reject_environment(OmegaConf.to_container(layer))
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, *layers))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise _typed_error(error) from None


# Keys that change nothing of what a sound run computes: a run may go on with other values of them.
_FREE = (
    "run.dir", "run.compilation_cache", "run.on_nonfinite", "run.max_skipped", "run.watchdog_seconds", "corpus.lenient",
    "corpus.cache_dir", "corpus.workers", "prepare.engine",
    "checkpoint.temporary_every", "checkpoint.host_gigabytes",
)  # fmt: skip


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted names of the keys whose values differ; where the run folder lies, and what to do about faults, may."""
    before, after = dotted(old.to_mapping()), dotted(new.to_mapping())
    keys = sorted(before.keys() | after.keys())
    return [key for key in keys if key not in _FREE and before.get(key) != after.get(key)]


def fingerprint(*parts: Any) -> str:
    """A short stable hash of plain values or dataclasses."""
    plain = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- reading


def _read_overrides(overrides: list[str] | tuple[str, ...]) -> Any:
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"override {' '.join(overrides)!r} is not readable YAML ({reason}): quote the value") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the YAML reader has many error classes
        raise UserError(f"{file} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file} must hold a mapping of sections ({', '.join(_names(Config))})")
    return {str(key): value for key, value in loaded.items()}


def _unlock(node: Any) -> None:
    """Frozen dataclasses give read-only nodes; merging needs them writable."""
    OmegaConf.set_readonly(node, False)
    if OmegaConf.is_dict(node):
        for key in node:
            if OmegaConf.is_config(node[key]):
                _unlock(node[key])


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _reject_unknown(mapping: Any, cls: type, prefix: str) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(
            prefix.rstrip(".") or "(file)", mapping, f"must be a section with keys {', '.join(_names(cls))}"
        )
    sections = {f.name: f.default_factory for f in dataclasses.fields(cls)}
    for key, value in mapping.items():
        if key not in sections:
            raise ConfigError(
                prefix + str(key), value, f"unknown key; the nearest is {_nearest(prefix, str(key), sections)}"
            )
        if dataclasses.is_dataclass(sections[key]):
            _reject_unknown(value, sections[key], f"{prefix}{key}.")  # type: ignore[arg-type]


def _reject_environment(mapping: Any) -> None:
    """A value that stands for a variable would be written into the run folder, be it a secret or not."""
    for key, value in dotted(mapping).items():
        if "${oc.env" in str(value):
            raise ConfigError(key, value, "must be the value itself: what it stands for would be in config.yaml")


def _nearest(prefix: str, key: str, known: Iterable[str]) -> str:
    """The key that was meant: one of this section, or, where the section was left out, one of that name."""
    elsewhere = [name for name in dotted(Config().to_mapping()) if name.endswith(f".{key}")]
    if elsewhere and not prefix:
        return elsewhere[0]
    return prefix + difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _typed_error(error: OmegaConfBaseException) -> UserError:
    key, value = str(getattr(error, "full_key", None) or "(unknown)"), getattr(error, "value", None)
    return ConfigError(key, value, f"must be {_expected(key)}")


def _expected(key: str) -> str:
    """What the type of a key admits, in words."""
    section, _, rest = key.partition(".")
    types = {f"{f.name}.{leaf.name}": str(leaf.type) for f in dataclasses.fields(Config) for leaf in _leaves(f)}
    name, _, entry = rest.partition(".")
    declared = types.get(f"{section}.{name}", "")
    inner = declared.removeprefix("typing.Optional[") if declared.startswith("typing.Optional") else declared
    null = ", or null" if inner != declared else ""
    words = {
        "<class 'int'>": "a whole number", "int]": "a whole number",
        "<class 'float'>": "a number", "float]": "a number",
        "<class 'bool'>": "true or false", "bool]": "true or false",
        "list[str]": "a list of names, such as [one,two]", "list[str]]": "a list of names, such as [one,two]",
        "dict[str, float]": "a number" if entry else "a mapping of names to numbers",
        "dict[str, str]": "text" if entry else "a mapping of names to text",
    }  # fmt: skip
    return words.get(inner, "text") + null


def _leaves(section: Any) -> Any:
    return dataclasses.fields(section.default_factory)


def dotted(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
