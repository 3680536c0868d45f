"""`opus-jax compile`: what the training step needs on a TPU slice that is not there.

libtpu compiles for a slice that is only named, but it must be told so before JAX starts, so the work is done in a
child process: `opus_jax.training.lower_step` lowers the step, `measure` compiles it.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from opus_jax.config import Config
from opus_jax.distributed.topology import Topology, compiler_environment, parse_topology
from opus_jax.errors import MissingExtraError, UserError

GIB = 2**30
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CHILD = "opus_jax.training.lower_step"
_ERROR_LINES = 20  # of the child's standard error, shown when it fails


def compile_for(config: Config, topology: str, *, json_file: Path | None = None) -> dict[str, Any]:
    """Compile the training step of a configuration for an absent slice, print what it needs, and return the figures.

    Args:
      topology: for example "v5p:2x2x4" (see `opus_jax.distributed.topology`).
      json_file: also write the figures there.

    Raises:
      UserError: the slice does not exist, or the step does not fit it or its memory.
      MissingExtraError: libtpu is not installed.
    """
    slice_ = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("opus-jax compile", "libtpu (Linux x86-64)", "tpu")
    figures = compile_in_child({"config": config.to_mapping(), "topology": slice_.name}, slice_)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")
    if not figures["fits"]:
        advice = "lower batch.microbatch or selection.score_chunk, raise mesh.fsdp, or take a larger slice"
        raise UserError(f"the step does not fit {slice_.name}: {figures['reason']}; {advice}")
    print(describe(figures))
    return figures


def compile_in_child(request: dict[str, Any], topology: Topology) -> dict[str, Any]:
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


def measure(lowered: Any, topology: Topology) -> dict[str, Any]:
    """Compile a lowered function and read the compiler's figures, all of one device (bytes, FLOPs, seconds).

    FLOPs, bytes moved and kernel calls are the compiler's counts, which take the body of a loop (layers, chunks) once;
    of a kernel they are what its author states as its cost.
    """
    import jax

    slice_: dict[str, Any] = {"topology": topology.name, "chips": topology.chips, "devices": topology.devices}
    slice_ |= {
        "hbm_bytes": int(topology.generation.hbm_gib * GIB),
        "devices_per_chip": topology.generation.devices_per_chip,
    }
    begun = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return slice_ | {"fits": False, "reason": _first_sentence(str(error))}
    figures = {"fits": True, "compile_seconds": time.perf_counter() - begun} | _memory(compiled)
    cost, program = compiled.cost_analysis(), compiled.as_text()
    counts = {"flops": int(cost["flops"]), "moved_bytes": int(cost["bytes accessed"])}
    return slice_ | figures | counts | {"collectives": count_collectives(program), "kernels": kernel_calls(program)}


def count_collectives(program: str) -> dict[str, int]:
    """Collective operations of each kind in a compiled program (HLO text); a start and its done count once."""
    kinds = "|".join(COLLECTIVES)
    return dict(Counter(re.findall(rf" ({kinds})(?:-start)?\(", program)))


def kernel_calls(program: str) -> dict[str, dict[str, int]]:
    """Pallas kernels of a compiled program (HLO text), by name: calls, and the FLOPs and bytes moved that they state.

    A kernel without a cost estimate counts as a call of no cost, as it does in the compiler's own totals.
    """
    found: dict[str, dict[str, int]] = {}
    for name, call in re.findall(
        r"^ *(?:ROOT )?%([\w-]+)[.\w]* = (.*custom_call_target=\"tpu_custom_call\".*)$", program, re.M
    ):
        kernel = found.setdefault(name, {"calls": 0, "flops": 0, "bytes": 0})
        kernel["calls"] += 1
        for key, stated in (("flops", "flops"), ("bytes", "bytes_accessed")):
            estimate = re.search(rf'"cost_estimate":{{[^}}]*"{stated}":"(\d+)"', call)
            kernel[key] += int(estimate.group(1)) if estimate else 0
    return found


def describe(figures: dict[str, Any]) -> str:
    """The figures as lines for a person."""
    per_chip = figures["devices_per_chip"]
    kinds = [f"{count} {kind}" for kind, count in sorted(figures["collectives"].items())]
    share = figures["peak_bytes"] / figures["hbm_bytes"]
    return "\n".join(
        [
            f"{figures['topology']}: chips {figures['chips']}, devices {figures['devices']}, "
            f"compiled in {figures['compile_seconds']:.1f} s",
            f"HBM per chip: {_size(figures['peak_bytes'] * per_chip)} of {_size(figures['hbm_bytes'] * per_chip)} "
            f"at the peak ({share:.1%})",
            *(f"  {name:<12}{_size(figures[f'{name}_bytes'] * per_chip)}" for name in _PARTS),
            "per device, loop bodies counted once:",
            f"  {'FLOPs':<12}{figures['flops']:.3g}",
            f"  {'moved':<12}{_size(figures['moved_bytes'])}",
            f"  {'collectives':<12}{', '.join(kinds) or 'none'}",
            f"  {'kernels':<12}{_kernels(figures)}",
        ]
    )


_PARTS = ("arguments", "outputs", "aliased", "temporaries", "program")


def _kernels(figures: dict[str, Any]) -> str:
    """For example: `count_sketch: 34 calls, 3.7 MiB moved (1.2%), 0.1% of the FLOPs`."""
    each = [
        f"{name}: {kernel['calls']} calls, {_size(kernel['bytes'])} moved "
        f"({_share(kernel['bytes'], figures['moved_bytes'])}), {_share(kernel['flops'], figures['flops'])} of the FLOPs"
        for name, kernel in sorted(figures["kernels"].items())
    ]
    return "; ".join(each) or "none"


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _memory(compiled: Any) -> dict[str, int]:
    stats = compiled.memory_analysis()
    parts = {
        "arguments_bytes": stats.argument_size_in_bytes,
        "outputs_bytes": stats.output_size_in_bytes,
        "aliased_bytes": stats.alias_size_in_bytes,  # outputs that take the place of donated arguments
        "temporaries_bytes": stats.temp_size_in_bytes,
        "program_bytes": stats.generated_code_size_in_bytes,
    }
    return parts | {"peak_bytes": sum(parts.values()) - 2 * parts["aliased_bytes"]}


def _first_sentence(message: str) -> str:
    """`RESOURCE_EXHAUSTED: ... Ran out of memory ... (15.75G). HLO ...` -> the middle part."""
    found = re.search(r"Ran out of memory[^\n]*?\)(?=\.|$)", message)
    return found.group(0) if found else message.splitlines()[0]


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
