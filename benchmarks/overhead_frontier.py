"""How well candidates are ranked for how much overhead: every setting that no other beats, at two lengths of rows.

`spearman.<setting>`: rank agreement of the scores as the setting would have used them with the exact utilities
(forward mode, whole row, all parameters, a fresh proxy gradient) of that step's candidates, averaged over all steps of
a run that trains on random rows, warm start excluded; a step at which nothing stands in for a score counts as 0.
`overhead.<setting>`: FLOPs of scoring, proxy and direction over those of plain training, for the measured model and 64
candidates, 32 of which are trained on, and 8 proxy rows; `overhead_gpt2_xl.<setting>`: the same for GPT-2 XL.

Settings: `row2048` and `paper` (rows of 6144 tokens) are the best within 10 % and 4.7 % of the measured model's
training, `<these>_every_step` the best that score at every step within 25 %; `<these>_gpt2_xl` the best where the
budget has to hold for GPT-2 XL too. `<these>_pieces` may also score several pieces of a row, `<these>_prior` moreover
average scores with estimates of their groups, neither of which a run can do. `<these>_<name>` are single lines around a
base. What no other setting beats, and all the rest, is in the setting's tables.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.efficiency.mixes import REPORT, pool
from benchmarks.frontier.frontier import Figure, best, lines, measured_figures, non_dominated
from benchmarks.frontier.points import write_table
from benchmarks.frontier.scorers import BATCH_ROWS, CANDIDATES, PROXY_ROWS
from benchmarks.frontier.tape import Length, Moment, kept, record
from benchmarks.harness import Figures, measured, parser_of, report
from opus_jax.config import Config, from_mapping
from opus_jax.models.presets import PRESETS
from opus_jax.selection.feedback import FeedbackState
from opus_jax.training.build import Parts, build


@dataclass(frozen=True)
class Scale:
    """How much of a row length is measured: `candidates` and `proxy_rows` at each of `seeds` runs' steps."""

    budget: float
    candidates: int
    batch_rows: int
    proxy_rows: int
    seeds: int
    length: Length


EVERY_STEP_BUDGET = 0.25
SCALES = {
    2048: Scale(0.10, 12, 2, 8, 1, Length(steps=60, warm_steps=20, chunk=1)),
    6144: Scale(0.047, 6, 1, 4, 1, Length(steps=24, warm_steps=10, chunk=1, factors=())),
}
QUICK = {2048: (3, 1), 6144: (1, 1)}  # steps, and warm ones
NAMES = {2048: "row2048", 6144: "paper"}


def main() -> None:
    parser = parser_of("overhead_frontier", __doc__ or "")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps recorded scores; null = none kept")
    parser.add_argument("--write-table", action="store_true", help="give selection.max_overhead what was measured")
    args = parser.parse_args()
    report(args, *measured(lambda: measure(args.quick, args.work, write=args.write_table)))


def measure(quick: bool, work: Path | None = None, *, write: bool = False) -> tuple[dict[str, Any], Figures]:
    figures: Figures = {}
    setting: dict[str, Any] = {}
    for row_tokens, scale in SCALES.items():
        if quick:
            steps, warm = QUICK[row_tokens]
            scale = replace(
                scale, seeds=1, length=replace(scale.length, steps=steps, warm_steps=warm, factors_every=steps)
            )
        config, found = measured_length(row_tokens, scale, work)
        if write and NAMES[row_tokens] == "row2048":
            write_table(found)
        figures |= figures_of(named_figures(NAMES[row_tokens], scale, found))
        setting |= {NAMES[row_tokens]: described(config, scale) | tables(NAMES[row_tokens], scale, found)}
    plain = [f"{name}{kind}" for name in NAMES.values() for kind in ("", "_every_step", "_gpt2_xl")]
    return {**setting, "method_arms": plain}, figures


def measured_length(row_tokens: int, scale: Scale, work: Path | None) -> tuple[Config, list[Figure]]:
    """The configuration of one row length, and all that was measured there."""
    parts = build(config_of(row_tokens, scale))
    moments = [_moments(parts, row_tokens, seed, scale.length, work) for seed in range(scale.seeds)]
    start = parts.steering().controller
    assert isinstance(start, FeedbackState)
    large = replace(PRESETS["gpt2-xl"], max_length=row_tokens)
    return parts.config, measured_figures(parts.spec, large, parts.config, scale.length.factors, moments, start)


def named_figures(name: str, scale: Scale, found: list[Figure]) -> dict[str, Figure]:
    """The settings that the benchmark is about, and the lines."""
    in_lines = set(lines(scale.length.factors))
    return {f"{name}_{x.setting.name}": x for x in found if x.setting in in_lines} | picked(name, scale.budget, found)


def tables(name: str, scale: Scale, found: list[Figure]) -> dict[str, Any]:
    """What was picked, what nothing beats that a run can do (alone and with pieces of rows), and everything."""
    alone = [x for x in found if x.setting.prior is None]
    plain = [x for x in alone if x.setting.scorer.pieces == 1]
    return {
        "picked": {key: x.setting.name for key, x in picked(name, scale.budget, found).items()},
        "frontier": [_row(x) for x in non_dominated(plain)],
        "frontier_gpt2_xl": [_row(x) for x in non_dominated(x.for_gpt2_xl for x in plain)],
        "frontier_pieces": [_row(x) for x in non_dominated(alone)],
        "frontier_prior": [_row(x) for x in non_dominated(found)],
        "all": [_row(x) for x in sorted(found, key=lambda x: x.setting.name)],
    }


def picked(name: str, budget: float, found: list[Figure]) -> dict[str, Figure]:
    """The settings that the benchmark is about; `_prior` where no run can do it yet."""
    alone = [x for x in found if x.setting.prior is None]
    plain = [x for x in alone if x.setting.scorer.pieces == 1]
    every_step = [x for x in found if x.setting.every == 1 and x.overhead <= EVERY_STEP_BUDGET]
    return {
        name: best(plain, lambda x: x.overhead <= budget),
        f"{name}_every_step": best(
            (x for x in plain if x.setting.every == 1), lambda x: x.overhead <= EVERY_STEP_BUDGET
        ),
        f"{name}_gpt2_xl": best(plain, lambda x: max(x.overhead, x.overhead_gpt2_xl) <= budget),
        f"{name}_pieces": best(alone, lambda x: x.overhead <= budget),
        f"{name}_prior": best(found, lambda x: x.overhead <= budget),
        f"{name}_prior_every_step": best(every_step, lambda x: True),
        f"{name}_prior_gpt2_xl": best(found, lambda x: max(x.overhead, x.overhead_gpt2_xl) <= budget),
    }


def figures_of(named: dict[str, Figure]) -> Figures:
    figures: Figures = {}
    for name, x in named.items():
        figures[f"overhead.{name}"] = [x.overhead]
        figures[f"overhead_gpt2_xl.{name}"] = [x.overhead_gpt2_xl]
        figures[f"spearman.{name}"] = list(x.spearman)
    return dict(sorted(figures.items()))


def config_of(row_tokens: int, scale: Scale) -> Config:
    mapping = pool(REPORT, "clean")
    mapping["corpus"] |= {
        "domains": list(REPORT.domains), "max_bytes": 2_000_000, "row_tokens": row_tokens,
        "validation_share": 0.05, "proxy_share": 0.2,
    }  # fmt: skip
    mapping["proxy"] |= {"rows": scale.proxy_rows}
    return from_mapping(
        mapping
        | {
            "tokenizer": {"vocab_size": 1024},
            # One narrow head: attention over so many tokens would else be nine tenths of so small a model.
            "model": {"preset": "tiny", "heads": 1, "head_dim": 16, "dtype": "float32"},
            "optimizer": {"schedule": "constant", "learning_rate": 0.003},
            "batch": {"rows": scale.batch_rows, "microbatch": 1},
            "selection": {
                "ratio": scale.batch_rows / scale.candidates,
                "warm_start_steps": scale.length.warm_steps,
                "audit_every": 0,
            },
            "feedback": {"enabled": True, "window_steps": 5, "max_epochs": None},
        }
    )  # fmt: skip


def described(config: Config, scale: Scale) -> dict[str, Any]:
    return {
        "row_tokens": config.corpus.row_tokens,
        "budget": scale.budget,
        "corpus": config.corpus.name,
        "max_bytes": config.corpus.max_bytes,
        "weights": config.corpus.weights,
        "proxy": config.proxy.domains,
        "model": config.model.preset,
        "layers": 2,
        "heads": config.model.heads,
        "head_dim": config.model.head_dim,
        "trained_on": "random rows",
        "candidates": scale.candidates,
        "batch_rows": scale.batch_rows,
        "proxy_rows": scale.proxy_rows,
        "counted": {"candidates": CANDIDATES, "batch_rows": BATCH_ROWS, "proxy_rows": PROXY_ROWS},
        "learning_rate": config.optimizer.learning_rate,
        "steps": scale.length.steps,
        "warm_steps": scale.length.warm_steps,
        "steps_between_factors": scale.length.factors_every,
        "seeds": scale.seeds,
        "feedback_window_steps": config.feedback.window_steps,
    }


def _moments(parts: Parts, row_tokens: int, seed: int, length: Length, work: Path | None) -> list[Moment]:
    print(f"rows of {row_tokens} tokens, seed {seed}: {length.steps} steps", file=sys.stderr, flush=True)
    seeded = replace(parts, config=replace(parts.config, run=replace(parts.config.run, seed=seed)))
    if work is None:
        return list(record(seeded, length))
    return kept(work / f"{row_tokens}-{length.steps}-{seed}.pickle", seeded, length)


def _row(x: Figure) -> dict[str, Any]:
    return {
        "name": x.setting.name,
        "overhead": round(x.overhead, 5),
        "overhead_gpt2_xl": round(x.overhead_gpt2_xl, 5),
        "spearman": round(x.mean, 4),
    }


if __name__ == "__main__":
    main()
