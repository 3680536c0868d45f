"""Small real runs: a folder of text with three domains, a byte tokenizer and a tiny model."""

import json
import random
from pathlib import Path
from typing import Any

from opus_jax.config import Config, from_mapping

SYLLABLES = ["ka", "to", "mi", "ren", "sul", "va", "no", "pi", "dor", "el"]


def write_text(folder: Path) -> Path:
    """Three domains: `prose` and `verse` share words, `noise` is random characters."""
    for domain, alphabet, seed in (("prose", SYLLABLES, 1), ("verse", SYLLABLES[::-1], 2), ("noise", "xqzjw#@!%0", 3)):
        dice = random.Random(seed)
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for i in range(40):
            words = ["".join(dice.choices(alphabet, k=dice.randint(1, 3))) for _ in range(dice.randint(60, 160))]
            (folder / domain / f"{i}.txt").write_text(" ".join(words))
    return folder


def mapping(root: Path, run: str = "run") -> dict[str, Any]:
    """Settings of a run of 12 steps that selects towards `prose`; text, records and run folders lie below `root`."""
    return {
        "corpus": {
            "name": "local", "path": str(root / "text"), "cache_dir": str(root / "cache"), "workers": 1,
            "row_tokens": 32, "validation_share": 0.2, "proxy_share": 0.2,
        },
        "tokenizer": {"kind": "byte"},
        "model": {"preset": "tiny", "layers": 1, "width": 32, "heads": 2, "hidden": 48},
        "optimizer": {"warmup_steps": 2, "schedule": "constant", "learning_rate": 0.01},
        "run": {"dir": str(root / run), "steps": 12, "eval_every": 6, "save_every": 4, "compilation_cache": None},
        "batch": {"rows": 8},
        "selection": {"warm_start_steps": 3, "audit_every": 4, "audit_rows": 4},
        "proxy": {"domains": ["prose"], "rows": 8},
        "evaluation": {"rows": 8, "batch_rows": 8},
        "tracking": {"tensorboard": False},
    }  # fmt: skip


def small_config(root: Path, *overrides: str, run: str = "run") -> Config:
    if not (root / "text").exists():
        write_text(root / "text")
    return from_mapping(mapping(root, run), overrides)


def lines(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
