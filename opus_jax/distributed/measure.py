"""What one compiled program needs: memory as the compiler lays it out, work, communication and time by a roofline."""

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opus_jax.distributed.hlo import Collective, collectives
from opus_jax.distributed.hlo_costs import totals
from opus_jax.distributed.hlo_text import Shape, parse
from opus_jax.distributed.roofline import estimate, speeds
from opus_jax.distributed.topology import Topology

MEMORY_PARTS = ("arguments", "outputs", "aliased", "temporaries", "program")
LARGEST = 6  # buffers that are named

Figures = dict[str, Any]


@dataclass(frozen=True)
class Lowered:
    """One function ready to be compiled.

    Attributes:
      program: a `jax.stages.Lowered`.
      mesh: of devices that need not be there.
      useful_flops: of all devices together, what the result asks for by hand count; 0 = not known.
      arguments: (name, bytes on one device) of what lies in memory throughout.
      every: executions between two that take the longer branch of its conditionals, such as fresh proxy gradients.
    """

    program: Any
    mesh: Any
    useful_flops: int = 0
    arguments: Sequence[tuple[str, int]] = ()
    every: int = 1


def measure(lowered: Lowered, topology: Topology) -> Figures:
    """Compile and read the figures of one device: bytes, FLOPs, seconds.

    Bytes of memory are the compiler's. FLOPs, bytes moved, kernels and collectives are counted from the compiled text,
    loops with their trips; of a kernel they are what its author states. Where it does not fit: `fits` is false,
    `reason` the compiler's words, `largest` its list of the largest buffers, or, where it gives up before it has one,
    the largest values of the function if they split evenly, and `held` the largest of what lies in memory throughout.
    """
    import jax

    begun = time.perf_counter()
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        held = [{"name": name, "bytes": size} for name, size in largest_first(lowered.arguments)]
        largest = listed_buffers(str(error)) or largest_values(lowered.program.as_text(), lowered.mesh.devices.size)
        return {"fits": False, "reason": out_of_memory(str(error)), "largest": largest, "held": held}
    figures = {"fits": True, "compile_seconds": time.perf_counter() - begun} | _memory(compiled)
    return figures | of_program(compiled.as_text(), lowered, topology)


def of_program(text: str, lowered: Lowered, topology: Topology) -> Figures:
    """Work, communication and expected time of a compiled program (HLO text).

    FLOPs, bytes, kernels and collectives are of an execution that takes the longer branch of every conditional;
    `seconds` are the mean of one such and `every` - 1 that take the shorter.
    """
    program = parse(text)
    counted, found = totals(program), collectives(program, lowered.mesh)
    longest, shortest = (
        estimate(x, lowered.mesh, topology) for x in (program, dataclasses.replace(program, longest=False))
    )
    mean = longest.mixed(shortest, 1 / lowered.every)
    seconds = {key: getattr(mean, key) for key in ("compute", "communication", "apart", "overlapped")}
    peak = speeds(topology).flops * lowered.mesh.devices.size
    return {
        "flops": counted.flops,
        "moved_bytes": counted.bytes,
        "kernels": counted.kernels,
        "collectives": [dataclasses.asdict(x) for x in found],
        "collective_bytes": sum(x.moved for x in found),
        "unknown_loops": len(program.unknown_loops),
        "every": lowered.every,
        "seconds": seconds,
        "longest_seconds": {"apart": longest.apart, "overlapped": longest.overlapped},
        "useful_flops": lowered.useful_flops,
        "mfu": {key: lowered.useful_flops / (peak * seconds[key]) for key in ("apart", "overlapped") if seconds[key]},
    }


def read_collectives(figures: Figures) -> list[Collective]:
    """Of figures that come from JSON."""
    return [Collective(x["kind"], tuple(x["axes"]), x["bytes"], x["count"]) for x in figures["collectives"]]


def largest_first(sizes: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(sizes, key=lambda item: -item[1])[:LARGEST]


def listed_buffers(message: str) -> list[dict[str, Any]]:
    """The largest allocations that the compiler lists when memory runs out: name, shape and bytes of each."""
    found: list[dict[str, Any]] = []
    for block in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(r"([\d.]+)([KMGT]?)", block)
        name = re.search(r'op_name="([^"]*)"', block) or re.search(r"XLA label: (\S+)", block)
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", block)
        if size:
            scale = 1024 ** " KMGT".index(size[2] or " ")
            of = f"{shape[1] if shape else ''} {name[1] if name else 'unnamed'}".strip()
            found.append({"name": of, "bytes": int(float(size[1]) * scale)})
    return sorted(found, key=lambda item: -item["bytes"])[:LARGEST]


def largest_values(stablehlo: str, devices: int) -> list[dict[str, Any]]:
    """The largest arrays in the text of a lowered function, stacked by scans or not, as a device's share."""
    sizes = []
    for found, dtype in sorted(set(re.findall(r"tensor<((?:\d+x)+)([a-z]+\d+)>", stablehlo))):
        dims = found.strip("x").split("x")
        shape = Shape(dtype, tuple(map(int, dims)))
        sizes.append((f"{dtype}[{','.join(dims)}] split {devices} ways", shape.bytes))
    return [{"name": name, "bytes": size // devices} for name, size in largest_first(sizes)]


def out_of_memory(message: str) -> str:
    """`RESOURCE_EXHAUSTED: ... Ran out of memory ... (15.75G). HLO ...` -> the middle part."""
    found = re.search(r"Ran out of memory[^\n]*?\)(?=\.|$)", message)
    return found.group(0) if found else message.splitlines()[0]


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
