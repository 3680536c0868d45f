"""What training with OPUS needs on TPU pods, compiled for chips that are not there: configs/pods, and weak scaling.

`hbm_gb.<config>`: peak memory of a chip (GB = 1e9 bytes) in the step that chooses; `step_seconds.<config>` and
`mfu.<config>`: expected time of the mean choosing step and the share of the peak FLOP/s that training itself uses,
from the roofline in `opus_jax/distributed/roofline.py`, communication after the work; `<key>_overlapped`: communication
beside the work. `selection_overhead.<config>`: what choosing adds to the time of plain steps, a step that chooses in
`select_every`.

Weak scaling, GPT-2 XL on v5p at the same rows a chip: `selection_bytes_ratio.<8_64 or 8_512>`: bytes that a chip
communicates in a choosing step beyond those of a plain one, over the same at 8 chips; `step_time_ratio.<...>`: expected
time of the choosing step over that at 8 chips, `step_time_ratio_overlapped.<...>` with overlap;
`selection_share.<chips>`: choosing's share of the step.
"""

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, measured, parser_of, report
from opus_jax.config import Config, fingerprint
from opus_jax.distributed.compile import figures_for
from opus_jax.distributed.topology import GIB, parse_topology

PODS = Path(__file__).parents[1] / "configs" / "pods"
SLICES = {"v5p-64": "v5p:2x4x4", "v5e-256": "v5e:16x16"}  # by the end of a configuration's name
WEAK = "gpt2_xl_opus_v5p-64"
WEAK_SHAPES = {8: "v5p:2x2x2", 64: "v5p:4x4x4", 512: "v5p:8x8x8"}
WEAK_ROWS, WEAK_PROXY_ROWS, WEAK_FSDP = 16, 2, 4  # a chip; data-parallel already on 8 chips
STEPS = ("train", "plain")
SMALL = (
    "model.layers=2", "model.width=256", "model.hidden=512", "model.heads=2", "model.kv_heads=2", "model.head_dim=128",
    "model.vocab_size=2048", "corpus.row_tokens=128",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One configuration on one slice."""

    name: str
    config: Config
    topology: str


def main() -> None:
    parser = parser_of("pod_scaling", __doc__ or "")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps what was compiled; null = none kept")
    parser.add_argument("--workers", type=int, default=2, help="compilations at once")
    args = parser.parse_args()
    report(args, *measured(lambda: measure(args.quick, args.work, args.workers)))


def measure(quick: bool, work: Path | None = None, workers: int = 2) -> tuple[dict[str, Any], Figures]:
    pods, weak = pod_jobs(quick), weak_jobs(quick)
    pool = ThreadPoolExecutor(workers)
    try:
        found = list(pool.map(lambda job: kept(job, work), [*pods, *weak]))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure nothing more is begun
    table = {job.name: figures for job, figures in zip(pods, found[: len(pods)], strict=True)}
    scaling = dict(zip(WEAK_SHAPES, found[len(pods) :], strict=True))
    print(markdown(table), file=sys.stderr)
    setting = {
        "pods": {name: _row(figures) for name, figures in table.items()},
        "weak_scaling": {str(chips): _row(figures) | {"mesh": figures["mesh"]} for chips, figures in scaling.items()},
        "rows_per_chip": WEAK_ROWS,
        "method_arms": [*table],
    }
    return setting, pod_figures(table) | weak_figures(scaling)


def pod_jobs(quick: bool) -> list[Job]:
    files = sorted(PODS.glob("*.yaml"))
    overrides = SMALL if quick else ()
    return [Job(file.stem, Config.load(file, overrides), SLICES[file.stem.rsplit("_", 1)[1]]) for file in files]


def weak_jobs(quick: bool) -> list[Job]:
    return [Job(f"weak-{chips}", weak_config(chips, quick), shape) for chips, shape in WEAK_SHAPES.items()]


def weak_config(chips: int, quick: bool) -> Config:
    """As many rows a chip whatever the slice."""
    rows = (
        f"batch.rows={WEAK_ROWS * chips}", f"proxy.rows={WEAK_PROXY_ROWS * chips}", f"evaluation.batch_rows={chips}",
        f"mesh.fsdp={WEAK_FSDP}",
    )  # fmt: skip
    return Config.load(PODS / f"{WEAK}.yaml", (*rows, *(SMALL if quick else ())))


def kept(job: Job, work: Path | None, steps: Sequence[str] = STEPS) -> dict[str, Any]:
    """The figures of a job; those in the folder are taken as they are."""
    file = None if work is None else work / f"{job.name}-{fingerprint(job.config, job.topology, steps)}.json"
    if file is not None and file.exists():
        return json.loads(file.read_text())
    print(f"compiling {job.name} for {job.topology}", file=sys.stderr, flush=True)
    figures = figures_for(job.config, parse_topology(job.topology), steps)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def pod_figures(table: dict[str, dict[str, Any]]) -> Figures:
    """A configuration that does not fit has no figures but null."""
    figures: Figures = {}
    for name, found in table.items():
        row = _row(found)
        figures[f"hbm_gb.{name}"] = [row["hbm_gb"]]
        for way, suffix in (("apart", ""), ("overlapped", "_overlapped")):
            figures[f"step_seconds{suffix}.{name}"] = [row[f"step_seconds_{way}"]]
            figures[f"mfu{suffix}.{name}"] = [row[f"mfu_{way}"]]
            figures[f"selection_overhead{suffix}.{name}"] = [row[f"overhead_{way}"]]
    return figures


def weak_figures(scaling: dict[int, dict[str, Any]]) -> Figures:
    first = scaling[min(scaling)]
    figures: Figures = {}
    for chips, found in scaling.items():
        figures[f"selection_share.{chips}"] = [found["selection_share"]["seconds_apart"]]
        if found is first:
            continue
        pair = f"{min(scaling)}_{chips}"
        figures[f"selection_bytes_ratio.{pair}"] = [selection_bytes(found) / selection_bytes(first)]
        for way, suffix in (("apart", ""), ("overlapped", "_overlapped")):
            times = [x["steps"]["train"]["seconds"][way] for x in (found, first)]
            figures[f"step_time_ratio{suffix}.{pair}"] = [times[0] / times[1]]
    return figures


def selection_bytes(found: dict[str, Any]) -> int:
    """Bytes that one chip communicates in a choosing step beyond those of a plain one."""
    return found["steps"]["train"]["collective_bytes"] - found["steps"]["plain"]["collective_bytes"]


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """For the README."""
    lines = [
        "| configuration | chips | peak HBM a chip | step, expected | MFU | selection adds |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in table.items():
        row = _row(found)
        allowed = found["hbm_bytes"] * found["devices_per_chip"] / GIB
        if row["hbm_gb"] is None:
            lines.append(f"| {name} | {found['chips']} | does not fit {allowed:.1f} GiB | | | |")
            continue
        peak = row["hbm_gb"] * 1e9 / GIB
        seconds, mfu, overhead = (
            f"{row[f'{key}_overlapped']:{form}} to {row[f'{key}_apart']:{form}}"
            for key, form in (("step_seconds", ".2f"), ("mfu", ".0%"), ("overhead", ".0%"))
        )
        lines.append(
            f"| {name} | {found['chips']} | {peak:.1f} of {allowed:.1f} GiB | {seconds} s | {mfu} | {overhead} |"
        )
    return "\n".join(lines)


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a configuration, of the mean choosing step; null where a step does not fit."""
    ways = ("apart", "overlapped")
    train, plain = (found["steps"][step] for step in STEPS)
    if not found["fits"]:
        keys = ("step_seconds", "mfu", "overhead")
        return {"topology": found["topology"], "hbm_gb": None} | {f"{key}_{way}": None for key in keys for way in ways}
    return {
        "topology": found["topology"],
        "hbm_gb": train["peak_bytes"] * found["devices_per_chip"] / 1e9,
        "communicated_gb": train["collective_bytes"] / 1e9,
        **{f"step_seconds_{way}": train["seconds"][way] for way in ways},
        **{f"mfu_{way}": train["mfu"][way] for way in ways},
        "select_every": found["select_every"],
        **{
            f"overhead_{way}": (train["seconds"][way] / plain["seconds"][way] - 1) / found["select_every"]
            for way in ways
        },
    }


if __name__ == "__main__":
    main()
