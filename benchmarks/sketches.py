"""Per-example sketches of gradients: what they cost in time and memory, and how much of the gradients they keep.

Time and memory on this machine, on a stack of transformer blocks: `benchmarks.sketching.speed`. Agreement with exact
inner products on text: `benchmarks.sketching.fidelity`. HBM traffic by the TPU compiler's figures, no TPU needed:
`benchmarks.sketching.traffic`.
"""

import dataclasses
import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.harness import Figures, run_benchmark
from benchmarks.sketching.fidelity import CANDIDATES, SKETCHES, config_of, measure_fidelity
from benchmarks.sketching.speed import FULL, QUICK, WIDTH, flop_ratios, measure_speed, memory_ratios
from benchmarks.sketching.traffic import LAYERS, MODELS, TOPOLOGY, measure_traffic
from opus_jax.errors import MissingExtraError

TRAFFIC_ROWS, TRAFFIC_TOKENS = 8, 512


def main() -> None:
    run_benchmark("sketches", __doc__ or "", measure)


def measure(quick: bool) -> tuple[dict[str, Any], Figures]:
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("benchmarks.sketches", "libtpu (Linux x86-64)", "tpu")
    size, (steps, seeds) = (QUICK, (60, 2)) if quick else (FULL, (100, 5))
    config = config_of(quick)
    _tell(f"fidelity: {steps} steps of training, {seeds} seeds; traffic: compiling for {TOPOLOGY}")
    changes: dict[str, Any] = {"layers": 2} if quick else {}
    with ThreadPoolExecutor(1) as beside:  # neither is timed
        traffic = beside.submit(lambda: measure_traffic(TRAFFIC_ROWS, TRAFFIC_TOKENS, **changes))
        figures = measure_fidelity(config, steps, seeds)
        figures |= traffic.result()
    _tell(f"speed: {size}")
    found, timed = measure_speed(size)
    figures |= timed | flop_ratios(size) | memory_ratios(size)
    setting = {
        "speed": dataclasses.asdict(size) | found | {"width": WIDTH, "dtype": "float32"},
        "fidelity": {
            "corpus": config.corpus.name,
            "weights": config.corpus.weights,
            "proxy": config.proxy.domains,
            "model": dataclasses.asdict(config.model),
            "row_tokens": config.corpus.row_tokens,
            "steps": steps,
            "seeds": seeds,
            "candidates": CANDIDATES,
            "sketches": {name: f"{sketch}, P {form}" for name, (sketch, form) in SKETCHES.items()},
        },
        "traffic": {
            "topology": TOPOLOGY,
            "models": MODELS,
            "layers": LAYERS,
            "rows": TRAFFIC_ROWS,
            "tokens": TRAFFIC_TOKENS,
            "dtype": "bfloat16",
            "changes": changes,
        },
        "method_arms": ["kron", "kron_2x64", "kron_factored", "kron_exact"],
    }
    return setting, dict(sorted(figures.items()))


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
