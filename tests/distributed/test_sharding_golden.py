"""What is written down of each mesh: where every leaf of the state lies, and every collective of a compiled step.

UPDATE_GOLDEN=1 python -m pytest tests/distributed/test_sharding_golden.py -m "slow or not slow"
writes it anew; read the difference before committing it. Collectives are kept for each minor version of JAX, whose
compilers differ; of a version without them only the places of the leaves are compared.
"""

import difflib
import json
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from distributed.compiled_steps import STEPS, program, shardings

GOLDEN = Path(__file__).parent / "golden"
VERSION = ".".join(jax.__version__.split(".")[:2])
COMPILED = [
    pytest.param(name, marks=() if name == "replica_data_fsdp" else pytest.mark.slow) for name in STEPS
]  # the others' programs no fast test has compiled


@pytest.mark.parametrize("name", STEPS)
def test_every_leaf_lies_where_it_lay(name: str) -> None:
    lines = [f"{leaf}: {spec}" for leaf, spec in shardings(name).items()]
    _compare(name, ("state",), lines)


@pytest.mark.parametrize("name", COMPILED)
def test_the_step_communicates_as_it_did(name: str) -> None:
    lines = [f"{x.count} x {x.kind}, {x.bytes} bytes, over {' '.join(x.axes)}" for x in program(name).collectives]
    _compare(name, ("collectives", VERSION), lines)


def _compare(name: str, keys: tuple[str, ...], lines: list[str]) -> None:
    file = GOLDEN / f"{name}.json"
    written = json.loads(file.read_text()) if file.exists() else {"step": list(STEPS[name])}
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(_with(written, keys, lines), indent=1) + "\n")
        return
    assert written["step"] == list(STEPS[name]), "written down of another step: write it anew"
    if keys[0] == "collectives" and VERSION not in written["collectives"]:
        return
    before: Any = written
    for key in keys:
        before = before[key]
    difference = [x for x in difflib.ndiff(before, lines) if x[0] in "+-"]
    assert not difference, f"{file.name}, before (-) and now (+):\n" + "\n".join(difference)


def _with(tree: dict[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = keys
    return tree | {first: _with(tree.get(first, {}), tuple(rest), value) if rest else value}
