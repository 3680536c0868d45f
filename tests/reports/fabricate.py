"""Run folders made without training, in the format of the trainer, and a small prepared corpus that they read."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import opus_jax.data.prepare as preparation
from opus_jax.config import Config, from_mapping
from opus_jax.data.documents import Corpus, Document, Domain
from opus_jax.data.records import Manifest

HOSTILE = {
    "prose": "</script><script>alert(1)</script> It was a bright cold day in April, & the clocks were striking.",
    "<img src=x onerror=alert(2)>": "<img src=x onerror=alert(3)> {{7*7}} ${7*7} %{y} __import__('os') \x07 \u202eabc",
    "%{y}<b>bold</b></script>{body}": "def f(x):\n\treturn x  # ]]> --> <!-- 𝒳 ünïcode",
}


def small_config(folder: Path, target: str = "prose", **sections: dict) -> Config:
    """A configuration of 80 steps over a small corpus of bytes, towards one domain."""
    mapping: dict = {
        "run": {"dir": str(folder / "run"), "steps": 80},
        "corpus": {
            "row_tokens": 128, "workers": 1, "validation_share": 0.2, "proxy_share": 0.2,
            "cache_dir": str(folder / "cache"),
        },
        "tokenizer": {"kind": "byte"},
        "optimizer": {"schedule": "constant"},
        "selection": {"warm_start_steps": 10},
        "proxy": {"domains": [target]},
        "batch": {"rows": 8},
    }  # fmt: skip
    for section, values in sections.items():
        mapping.setdefault(section, {}).update(values)
    return from_mapping(mapping)


def prepare_texts(config: Config, texts: dict[str, str], copies: int = 60) -> Path:
    """A records folder with one domain for each text, of `copies` documents that hold it."""

    def documents(name: str) -> Iterator[Document]:
        for i in range(copies):
            counting = " ".join(map(str, range(i, i + 9)))
            yield Document(f"Number {i}{'.' * (i % 7)} {texts[name]} {counting}", f"{name}/{i}.txt")

    domains = tuple(Domain(name, f"licence of {name}", partial(documents, name)) for name in texts)
    with patch.object(preparation, "load_corpus", lambda _: Corpus("small", domains, {})):
        return preparation.prepare(config, progress=False)


def write_run(
    folder: Path,
    config: Config,
    domains: list[str],
    *,
    gain: float = 0.0,
    finished: bool = True,
    records: Path | None = None,
) -> Path:
    """Write the files of a run. `gain` lowers its target curve; an unfinished run stops half way, in a torn line."""
    folder.mkdir(parents=True)
    config.save(folder / "config.yaml")
    steps = config.run.steps if finished else config.run.steps // 2
    lines = [line for step in range(1, steps + 1) for line in _metric_lines(step, config, domains, gain)]
    torn = "" if finished else '{"step": 99, "lo'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    if finished:
        (folder / "summary.json").write_text(json.dumps(_summary(lines, config, domains)))
    if config.selection.method != "none" and config.tracking.selection_log:
        _write_log(folder / "selection", config, len(domains), steps, records)
    if records is not None:
        named = {"folder": str(records), "fingerprint": Manifest.load(records).fingerprint}
        (folder / "records.json").write_text(json.dumps(named))
    return folder


def write_trained_pair(folder: Path, **sections: dict) -> Path:
    """`run` (opus) and `run-random`, over a prepared corpus; returns the folder of `run`."""
    config = small_config(folder, **sections)
    records = prepare_texts(config, HOSTILE)
    domains = list(Manifest.load(records).domains)
    random = small_config(folder, **(sections | {"selection": {"method": "random", "warm_start_steps": 10}}))
    write_run(folder / "run-random", random, domains, records=records)
    return write_run(folder / "run", config, domains, gain=0.1, records=records)


LABELS = ("chapter night said", "</script><img src=x onerror=alert(4)> %{y}", "2020 \u202e", "def return self")


def write_decisions(run: Path, domains: list[str], documents: list[int], first: int = 20, every: int = 10) -> Path:
    """A plan change every `every` steps of an 80-step run, in which domain 0 and the later clusters gain.

    Args:
      documents: ids, of which the last decision names the first few as stopped.
    """
    folder = run / "decisions"
    folder.mkdir()
    for change, step in enumerate(range(first, 80, every)):
        line = _decision(step, change, domains, documents)
        (folder / f"feedback-{step:09d}.json").write_text(json.dumps(line))
    return run


def _decision(step: int, change: int, domains: list[str], documents: list[int]) -> dict:
    lead = 0.8 * (1 - 0.7 ** (change + 1))
    weights = [lead * (i == 0) + (1 - lead) / len(domains) for i in range(len(domains))]
    tilt = np.linspace(-1, 1, 16)
    shares = np.exp(lead * tilt) / np.exp(lead * tilt).sum()
    return {
        "kind": "feedback", "step": step, "utilities_until": step - 10,
        "domains": {
            name: {
                "weight": weight, "mean": (1.0 if i == 0 else -0.4 * i) * lead,
                "standard_error": None if i == 2 and change == 0 else 0.4 / (change + 2), "scores": 160.0,
                "epochs": step * weight / 20,
            }
            for i, (name, weight) in enumerate(zip(domains, weights, strict=True))
        },
        "clusters": [
            {
                "cluster": i // 2, "label": LABELS[i % len(LABELS)], "domain": domains[i % 2 % len(domains)],
                "rows": 12.0 + i, "mean": float(tilt[i]), "standard_error": 0.1, "scores": 9.0 * (i != 5),
                "share": float(shares[i]), "base_share": 1 / 16,
            }
            for i in range(16)
        ],
        "documents": {"scored": 140, "share_top_tenth": 0.31, "stopped": 12},
        "stopped_examples": [
            {"document_id": i, "domain": domains[-1], "share_ratio": 0.02} for i in documents[:10]
        ],
    }  # fmt: skip


def target_curve(step: float, gain: float) -> float:
    return 3.0 - gain + 5.0 * np.exp(-step / 20)


def _metric_lines(step: int, config: Config, domains: list[str], gain: float) -> list[dict]:
    scored = config.selection.method == "opus" and step > config.selection.warm_start_steps
    totals = {
        "update_tokens": 1000 * step,
        "seen_tokens": 2000 * step if config.selection.method != "none" else 1000 * step,
        "flops": 10**9 * step * (2 if config.selection.method == "opus" else 1),
        "scoring_overhead": 1.0 if scored else 0.0,
    }
    line = {
        "step": step, "loss": 2 + 4 * np.exp(-step / 30), "learning_rate": 1e-3, "grad_norm": 1.0,
        "tokens_per_second": 5000.0 + step % 5, "data_wait_seconds": 0.001, "utility_mean": 0.1 * scored,
        "utility_sd": 1.0 * scored, "selected_share": dict.fromkeys(domains, 1 / len(domains)),
    } | totals  # fmt: skip
    if step == 7:
        line |= {"loss": None, "nonfinite": {"loss": "nan"}}
    if scored and step % 20 == 11:
        line["audit_rank_agreement"] = 0.95
    lines = [line]
    if step % 10 == 0:
        bits = target_curve(step, gain)
        lines.append(
            {"step": step, "bits_per_byte": dict.fromkeys(domains, bits), "target_bits_per_byte": bits} | totals
        )
    return lines


def _summary(lines: list[dict], config: Config, domains: list[str]) -> dict:
    last = lines[-1]
    kept = ("update_tokens", "seen_tokens", "flops", "scoring_overhead", "bits_per_byte", "target_bits_per_byte")
    return {key: last[key] for key in kept} | {
        "steps": config.run.steps, "wall_seconds": 30.0 if config.selection.method == "opus" else 12.0,
        "tokens_per_second": 5000.0, "selected_share": dict.fromkeys(domains, 1 / len(domains)),
        "loss_digest": "0" * 16, "batch_digest": "1" * 16, "parameters": 690_000,
    }  # fmt: skip


def _write_log(folder: Path, config: Config, domains: int, steps: int, records: Path | None) -> None:
    """Two parts. Domain 0 has high utilities, which fall with time; example ids are rows of the training split."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    starts = Manifest.load(records).domain_starts("train") if records else np.arange(domains + 1) * 100
    n, k = config.candidates, config.batch.rows
    tables = []
    for step in range(1, steps + 1):
        example = rng.integers(0, starts[-1], n)
        domain = np.searchsorted(starts, example, "right") - 1
        utility = rng.normal(size=n) + np.where(domain == 0, 2 - step / 40, 0)
        if config.selection.method == "random" or step <= config.selection.warm_start_steps:
            utility = np.zeros(n)
        z = (utility - utility.mean()) / (utility.std() or 1)
        selected = np.zeros(n, bool)
        selected[np.argsort(-z, kind="stable")[:k] if utility.any() else rng.permutation(n)[:k]] = True
        tables.append(log_table(step, example, domain, utility, z, selected))
    half = len(tables) // 2
    for part in (tables[:half], tables[half:]):
        first, last = part[0]["step"][0].as_py(), part[-1]["step"][0].as_py()
        pq.write_table(pa.concat_tables(part), folder / f"part-{first:09d}-{last:09d}.parquet")


def log_table(
    step: int, example: np.ndarray, domain: np.ndarray, utility: np.ndarray, z: np.ndarray, selected: np.ndarray
):
    """The candidates of one step, as the selection log holds them."""
    rows = len(example)
    return pa.table({
        "step": pa.array(np.full(rows, step), pa.int64()),
        "position": pa.array(np.arange(rows), pa.int32()),
        "example_id": pa.array(example, pa.int64()),
        "domain_id": pa.array(domain, pa.int32()),
        "utility": pa.array(utility, pa.float32()),
        "z": pa.array(z, pa.float32()),
        "probability": pa.array(np.full(rows, 1 / rows), pa.float32()),
        "redundancy": pa.nulls(rows, pa.float32()),
        "selected": pa.array(selected, pa.bool_()),
    })  # fmt: skip
