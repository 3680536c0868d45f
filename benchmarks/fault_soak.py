"""Training runs that are killed at random, again and again, against one that is not.

Each run is started, ended by kill -9 or SIGTERM at a random moment (of a start, a step or a save), and started again,
until it reaches its last step. Then the batches it trained on and the bits of its losses are compared with those of
the undisturbed run. No batch may be lost or doubled, no step repeated from further back than the newest checkpoint.
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.disturbed import End, Run, disturbed_until_done
from benchmarks.faults.small_run import SAVE_EVERY, STEPS, TEMPORARY_EVERY, configuration
from benchmarks.harness import Figures, measured, parser_of, report

QUICK_MINUTES, FULL_MINUTES = 2.0, 30.0
MUST_BE_ZERO = ("batches_lost", "batches_doubled", "runs_not_exact", "steps_behind_the_newest_save")


def main() -> int:
    parser = parser_of("fault_soak", __doc__ or "")
    parser.add_argument("--minutes", type=float, default=None, help=f"how long (default {FULL_MINUTES:g})")
    parser.add_argument("--processes", type=int, default=1, help="of each run; one of them is hit (default 1)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    args = parser.parse_args()
    minutes = args.minutes or (QUICK_MINUTES if args.quick else FULL_MINUTES)
    setting, figures = measured(lambda: soak(minutes, args.processes, args.seed))
    report(args, setting, figures)
    wrong = {key: sum(value or 0 for value in figures[key]) for key in MUST_BE_ZERO}
    if any(wrong.values()):
        print(f"fault_soak: broken: {wrong}", file=sys.stderr)
        return 1
    return 0


def soak(minutes: float, processes: int, seed: int | None) -> tuple[dict[str, Any], Figures]:
    """Disturb one run after the other until the time is over; the last one is brought to its end."""
    deadline = time.monotonic() + 60 * minutes
    seed = random.randrange(1 << 30) if seed is None else seed
    dice, ends, runs = random.Random(seed), list[End](), list[Run]()
    with tempfile.TemporaryDirectory(prefix="fault-soak-") as folder:
        root = Path(folder)
        whole = Run(configuration(root, "undisturbed"), root, processes)
        whole.finish()
        while not runs or time.monotonic() < deadline:
            run = Run(configuration(root, f"disturbed-{len(runs)}"), root, processes)
            ends += disturbed_until_done(run, dice, deadline)
            runs.append(run)
        compared = [run.compare(whole) for run in runs]
    exact = [found.exact for found in compared]
    figures: Figures = {
        "kills": [float(len(ends))],
        "exact_resumes": [float(sum(run.kills for run, same in zip(runs, exact, strict=True) if same))],
        "runs_not_exact": [float(exact.count(False))],
        "batches_lost": [float(sum(found.lost for found in compared))],
        "batches_doubled": [float(sum(found.doubled for found in compared))],
        "steps_repeated": [float(end.repeated) for end in ends],
        "steps_behind_the_newest_save": [float(end.behind) for end in ends],
    }
    kinds = {kind: sum(end.kind == kind for end in ends) for kind in sorted({end.kind for end in ends})}
    setting = {
        "minutes": minutes, "processes": processes, "seed": seed, "runs": len(runs), "steps": STEPS,
        "save_every": SAVE_EVERY, "temporary_every": TEMPORARY_EVERY, "ends": kinds, "method_arms": list(figures),
    }  # fmt: skip
    return setting, figures


if __name__ == "__main__":
    sys.exit(main())
