"""A process that trains one run after another on one core: a JSON line in for every run, a JSON line out.

In: {"folder": ..., "config": {...}}. Out: {"result": {...}} or {"error": class, "message": text}.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO


def main(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})  # before JAX counts the cores for its threads
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    from benchmarks.efficiency.runs import sources_digest

    sources_digest()  # of the code as it is now
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(_answer(order)) + "\n")


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    import jax

    from benchmarks.efficiency.runs import keep
    from opus_jax.config import from_mapping, replace
    from opus_jax.training.loop import train

    config = from_mapping(order["config"])
    config = replace(config, run=replace(config.run, dir=order["folder"]))
    try:
        summary = train(config, progress=False)
        return {"result": keep(Path(order["folder"]), summary, config)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        jax.clear_caches()  # compiled steps are kept on disk


def answer_to(line: str) -> dict[str, Any]:
    """What a worker said; a worker that died said nothing."""
    return json.loads(line) if line else {"error": "WorkerDied", "message": "the process ended without an answer"}


def ask(worker_in: TextIO, worker_out: TextIO, order: dict[str, Any]) -> dict[str, Any]:
    try:
        worker_in.write(json.dumps(order) + "\n")
        worker_in.flush()
    except BrokenPipeError:
        return answer_to("")
    return answer_to(worker_out.readline())


if __name__ == "__main__":
    main(int(sys.argv[1]))
