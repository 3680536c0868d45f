"""One run: its configuration, its folder, and what is kept of it."""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import opus_jax
from benchmarks.efficiency.arms import ARMS, TARGET_SHARE, Settings
from benchmarks.efficiency.mixes import MIXES, pool
from opus_jax.config import Config, fingerprint, from_mapping
from opus_jax.data.records import Manifest
from opus_jax.training.atomic import write_atomic

RESULT = "result.json"


@dataclass(frozen=True)
class Scale:
    """How large a run is; `overrides` come last, over the arm's and the trial's."""

    steps: int
    evaluations: int = 25
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Run:
    """One training run of the comparison. `trial` holds the tuned settings, as sorted pairs."""

    mix: str
    setting: str
    arm: str
    trial: tuple[tuple[str, Any], ...]
    seed: int
    scale: Scale

    @property
    def config(self) -> Config:
        return configure(self)

    @property
    def name(self) -> str:
        """Readable, and another for every configuration."""
        return f"{self.mix}-{self.setting}-{self.arm}-seed{self.seed}-{fingerprint(self.config.to_mapping())[:8]}"


def run_of(mix: str, setting: str, arm: str, trial: Settings, seed: int, scale: Scale) -> Run:
    return Run(mix, setting, arm, tuple(sorted(trial.items())), seed, scale)


@cache
def configure(run: Run) -> Config:
    """What the arm is, the trial, the pool and the scale, over what all runs share."""
    trial, mix = dict(run.trial), MIXES[run.mix]
    mapping = pool(mix, run.setting, trial.pop(TARGET_SHARE, None))
    layers = (_shared(run), ARMS[run.arm].settings, trial, dict(run.scale.overrides))
    for layer in layers:
        for key, value in layer.items():
            section, name = key.split(".", 1)
            mapping.setdefault(section, {})[name] = value
    return from_mapping(mapping)


def _shared(run: Run) -> Settings:
    steps = run.scale.steps
    return {
        "corpus.row_tokens": 64,
        "corpus.max_bytes": 4_000_000,
        "tokenizer.vocab_size": 1024,
        "model.preset": "tiny",
        "optimizer.schedule": "constant",
        "batch.rows": 8,
        "proxy.rows": 8,
        "selection.warm_start_steps": 10,
        "selection.audit_every": 0,
        "run.seed": run.seed,
        "run.steps": steps,
        "run.eval_every": max(1, steps // run.scale.evaluations),
        "run.save_every": steps,
        "run.log_every": steps,
        "evaluation.domains": [MIXES[run.mix].target],
        "evaluation.rows": 96,
        "evaluation.batch_rows": 96,
        "checkpoint.keep": 1,
        "checkpoint.best": False,
        "tracking.tensorboard": False,
        "tracking.selection_log": False,
    }


# ------------------------------------------------------------------------------------------- what is kept


def keep(folder: Path, summary: dict[str, Any], config: Config) -> dict[str, Any]:
    """Write what the comparison needs of a finished run into its folder, and return it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if line.get("target_bits_per_byte") is not None]
    rate = summary["tokens_per_second"]
    curve = {
        "update_tokens": [line["update_tokens"] for line in evaluated],
        "seen_tokens": [line["seen_tokens"] for line in evaluated],
        "flops": [line["flops"] for line in evaluated],
        "seconds": [line["update_tokens"] / rate if rate else 0.0 for line in evaluated],
        "bits_per_byte": [line["target_bits_per_byte"] for line in evaluated],
    }
    result = {
        "curve": curve,
        "final_bpb": summary["target_bits_per_byte"],
        "flops": summary["flops"],
        "update_tokens": summary["update_tokens"],
        "wall_seconds": summary["wall_seconds"],
        "selected_share": summary["selected_share"],
        "epochs": _epochs(folder, summary, config),
        "sources": sources_digest(),
    }
    write_atomic(folder / RESULT, json.dumps(result) + "\n")
    return result


def kept(folder: Path) -> dict[str, Any] | None:
    """What `keep` wrote, None for a run that is not finished."""
    file = folder / RESULT
    return json.loads(file.read_text()) if file.is_file() else None


def _epochs(folder: Path, summary: Mapping[str, Any], config: Config) -> float:
    """Passes of the update over the rows of the domain that was repeated most."""
    records = json.loads((folder / "records.json").read_text())["folder"]
    rows = Manifest.load(records).rows["train"]
    trained = config.run.steps * config.batch.rows
    return max(trained * share / rows[name] for name, share in summary["selected_share"].items() if rows.get(name))


@cache
def sources_digest() -> str:
    """A hash of the package that made a run; comments and line breaks do not count."""
    root, found = Path(opus_jax.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] not in ("reports", "cli.py", "doctor.py"):
            found.update(ast.dump(ast.parse(file.read_text())).encode())
    return found.hexdigest()[:16]
