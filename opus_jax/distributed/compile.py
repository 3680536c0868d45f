"""`opus-jax compile`: what the steps of a configuration need on TPU slices that are not there.

libtpu compiles for a slice that is only named, but it must be told so before JAX starts, so the work is done in a
child process: `opus_jax.training.lower_step` lowers the steps, `measure` compiles them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opus_jax.config import Config, from_mapping
from opus_jax.distributed.compile_report import describe, largest_buffers
from opus_jax.distributed.topology import GIB, Topology, compiler_environment, parse_topology
from opus_jax.errors import MissingExtraError, UserError

STEPS = ("train", "plain", "score", "decode")
_CHILD = "opus_jax.training.lower_step"
_ERROR_LINES = 20  # of the child's standard error, shown when it fails

Figures = dict[str, Any]


def compile_for(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    steps: Sequence[str] = (),
    json_file: Path | None = None,
    suggest: bool = False,
) -> Figures:
    """Compile the steps of a configuration for absent slices, print what they need, and return the figures.

    Args:
      topology: of one slice, for example "v5p:2x2x4" (see `opus_jax.distributed.topology`).
      slices: equal slices, connected by the data centre network; `mesh.replica` must be a multiple of them.
      steps: of STEPS; none = all that the configuration has. `train` chooses its rows, `plain` trains on all it gets.
      json_file: also write the figures there.
      suggest: where a step does not fit, compile it with changes that need less memory until one fits.

    Raises:
      UserError: the slice does not exist, or the steps do not fit it or its memory.
      MissingExtraError: libtpu is not installed.
    """
    target = parse_topology(topology, slices)
    if unknown := [step for step in steps if step not in STEPS]:
        raise UserError(f"--steps {','.join(unknown)}: must be among {','.join(STEPS)}")
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("opus-jax compile", "libtpu (Linux x86-64)", "tpu")
    figures = figures_for(config, target, steps)
    if suggest and not figures["fits"]:
        figures["fitting_changes"] = fitting_changes(config, target, unfit_steps(figures))
    if json_file is not None:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")
    if any(step["fits"] for step in figures["steps"].values()):
        print(describe(figures))
    if not figures["fits"]:
        raise UserError(f"{_does_not_fit(figures, target)}; {_advice(figures, suggest)}")
    return figures


def figures_for(config: Config, target: Topology, steps: Sequence[str] = ()) -> Figures:
    """The figures of steps by name, those of the slice, and selection's share (see `selection_share`)."""
    request = {"config": config.to_mapping(), "topology": target.slice_name, "slices": target.slices}
    answered = compile_in_child(request | {"steps": list(steps)}, target)
    figures: Figures = {
        "topology": target.name,
        "slices": target.slices,
        "chips": target.chips,
        "devices": target.devices,
        "devices_per_chip": target.generation.devices_per_chip,
        "hbm_bytes": int(target.generation.hbm_gib * GIB),
    }
    figures |= answered | {"fits": all(step["fits"] for step in answered["steps"].values())}
    return figures | {"selection_share": selection_share(answered["steps"])}


def selection_share(steps: dict[str, Figures]) -> dict[str, float]:
    """What choosing adds to a step, as a share of the step that chooses; empty unless both were compiled and fit.

    All that the choosing step has more than a plain one counts: proxy gradient, direction, scoring and the choice.
    """
    train, plain = steps.get("train"), steps.get("plain")
    if not (train and plain and train["fits"] and plain["fits"]):
        return {}
    keys = ("flops", "moved_bytes", "collective_bytes", "peak_bytes")
    pairs = {key: (train[key], plain[key]) for key in keys}
    pairs |= {f"seconds_{key}": (train["seconds"][key], plain["seconds"][key]) for key in ("apart", "overlapped")}
    return {key: 1 - without / whole for key, (whole, without) in pairs.items() if whole}


def fitting_changes(config: Config, target: Topology, steps: Sequence[str]) -> list[str] | None:
    """Overrides under which these steps fit, the fewest of `smaller` that do; None = none does."""
    for changes in smaller(config, target.devices):
        try:
            if figures_for(from_mapping(config.to_mapping(), changes), target, steps)["fits"]:
                return changes
        except UserError:  # rows that the mesh does not divide, say: this change cannot be made here
            continue
    return None


def smaller(config: Config, devices: int) -> Iterator[list[str]]:
    """Overrides that need less and less memory: each step keeps those before it.

    Recomputation costs a third more arithmetic, smaller chunks nothing while they fill the chip, parameters split
    more ways more communication: they are tried in the order of what they save for what they cost.
    """
    mesh = config.mesh
    shards = devices // mesh.tensor
    changes: list[str] = []
    if config.model.remat != "full":
        yield list(changes := [*changes, "model.remat=full"])
    if (config.batch.microbatch or config.batch.rows) > shards:
        yield list(changes := [*changes, f"batch.microbatch={shards}"])
    if config.selection.method != "none" and (config.selection.score_chunk or config.candidates) > shards:
        yield list(changes := [*changes, f"selection.score_chunk={shards}"])
    if mesh.fsdp < shards // mesh.replica:
        yield [*changes, "mesh.data=1", f"mesh.fsdp={shards // mesh.replica}"]


def unfit_steps(figures: Figures) -> list[str]:
    return [name for name, step in figures["steps"].items() if not step["fits"]]


def compile_in_child(request: dict[str, Any], topology: Topology) -> Figures:
    """Send one request to a fresh child process; any number of them may run at once."""
    child = subprocess.run(
        [sys.executable, "-m", _CHILD],
        input=json.dumps(request),
        env=os.environ | compiler_environment(topology),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        tail = "\n".join(child.stderr.splitlines()[-_ERROR_LINES:])
        raise RuntimeError(f"compiling for {topology.name} failed (exit {child.returncode}):\n{tail}")
    answer = json.loads(child.stdout.splitlines()[-1])
    if "mistake" in answer:
        raise UserError(f"compile for {topology.name}: {answer['mistake']}")
    return answer["figures"]


def _does_not_fit(figures: Figures, target: Topology) -> str:
    each = [f"{name} step: {figures['steps'][name]['reason']}" for name in unfit_steps(figures)]
    names = largest_buffers(figures["steps"][unfit_steps(figures)[0]])
    return f"does not fit {target.name}: {'; '.join(each)}; largest on a device: {names}"


def _advice(figures: Figures, tried: bool) -> str:
    if not tried:
        return (
            "set model.remat=full, lower batch.microbatch or selection.score_chunk, raise mesh.fsdp, or take a larger "
            "slice (--suggest tries these)"
        )
    changes = figures["fitting_changes"]
    return f"it fits with {' '.join(changes)}" if changes else "no setting tried fits: take a larger slice"
