"""A run that is small enough to be started a hundred times: selection, feedback, both kinds of checkpoints."""

import random
from pathlib import Path

from opus_jax.config import Config, from_mapping

STEPS, SAVE_EVERY, TEMPORARY_EVERY = 300, 40, 9


def configuration(root: Path, name: str) -> Config:
    """Text, prepared corpus and run folder lie below `root`."""
    if not (root / "text").exists():
        _write_text(root / "text")
    return from_mapping(
        {
            "corpus": {
                "name": "local", "path": str(root / "text"), "cache_dir": str(root / "cache"), "workers": 1,
                "row_tokens": 32, "validation_share": 0.2, "proxy_share": 0.2,
            },
            "tokenizer": {"kind": "byte"},
            "model": {"preset": "tiny", "layers": 1, "width": 32, "heads": 2, "hidden": 48},
            "optimizer": {"warmup_steps": 2, "schedule": "constant", "learning_rate": 0.01},
            "run": {
                "dir": str(root / name), "steps": STEPS, "eval_every": STEPS // 2, "save_every": SAVE_EVERY,
                "compilation_cache": str(root / "compiled"), "watchdog_seconds": 120.0,
            },
            "checkpoint": {"temporary_every": TEMPORARY_EVERY},
            "batch": {"rows": 8},
            "selection": {"warm_start_steps": 3, "select_every": 2, "audit_every": 0},
            "feedback": {"enabled": True, "window_steps": 10, "clusters": 4},
            "proxy": {"domains": ["ka"], "rows": 8},
            "evaluation": {"rows": 8, "batch_rows": 8},
            "tracking": {"tensorboard": False},
        }
    )  # fmt: skip


def _write_text(folder: Path) -> None:
    """Two domains whose words begin alike."""
    for domain in ("ka", "to"):
        dice = random.Random(domain)
        (folder / domain).mkdir(parents=True)
        for i in range(60):
            words = [domain + "".join(dice.choices("aeioumnlr", k=3)) for _ in range(dice.randint(60, 160))]
            (folder / domain / f"{i}.txt").write_text(" ".join(words))
