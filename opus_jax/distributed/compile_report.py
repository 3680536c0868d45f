"""What `opus-jax compile` prints."""

from collections import defaultdict
from typing import Any

from opus_jax.distributed.measure import MEMORY_PARTS, Figures
from opus_jax.distributed.topology import GIB

_NAMED = 3  # of the largest buffers, in a message of one line


def describe(figures: Figures) -> str:
    """The figures of all steps that fit, as lines for a person."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    head = f"{figures['topology']}: chips {figures['chips']}, devices {figures['devices']}, mesh {mesh}"
    blocks = [_step(name, step, figures) for name, step in figures["steps"].items() if step["fits"]]
    return "\n".join([head, *blocks, *_shares(figures)])


def _step(name: str, step: Figures, figures: Figures) -> str:
    per_chip, allowed = figures["devices_per_chip"], figures["hbm_bytes"]
    seconds, mfu = step["seconds"], step["mfu"]
    memory = ", ".join(f"{part} {size(step[f'{part}_bytes'] * per_chip)}" for part in MEMORY_PARTS)
    lines = [
        f"{name} step (compiled in {step['compile_seconds']:.1f} s)",
        f"  HBM per chip: {size(step['peak_bytes'] * per_chip)} of {size(allowed * per_chip)} at the peak "
        f"({step['peak_bytes'] / allowed:.1%}): {memory}",
        f"  a device: {step['flops']:.3g} FLOPs, {size(step['moved_bytes'])} moved",
        f"  kernels: {_kernels(step)}",
        *(f"  {line}" for line in _collectives(step)),
        f"  expected: {_time(seconds['apart'])} (work {_time(seconds['compute'])}, communication "
        f"{_time(seconds['communication'])}), {_time(seconds['overlapped'])} where they overlap; "
        f"MFU {mfu.get('apart', 0):.1%}, {mfu.get('overlapped', 0):.1%}",
    ]
    if step["every"] > 1:
        longest = step["longest_seconds"]
        lines.append(
            f"  that is the mean; one in {step['every']} refreshes the proxy gradient and takes "
            f"{_time(longest['apart'])}, {_time(longest['overlapped'])}: the counts above are its"
        )
    if step["unknown_loops"]:
        lines.append(f"  {step['unknown_loops']} loops of unknown length count once")
    return "\n".join(lines)


def _collectives(step: Figures) -> list[str]:
    """For example: `all-reduce over data: 12 of 3.1 MiB in all`."""
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for found in step["collectives"]:
        entry = sums[(found["kind"], "+".join(found["axes"]))]
        entry[0] += found["count"]
        entry[1] += found["count"] * found["bytes"]
    lines = [f"{kind} over {axes}: {n}, {size(moved)} in all" for (kind, axes), (n, moved) in sorted(sums.items())]
    return lines or ["collectives: none"]


def _kernels(step: Figures) -> str:
    """For example: `count_sketch: 34 calls, 3.7 MiB moved (1.2%), 0.1% of the FLOPs`."""
    each = [
        f"{name}: {kernel['calls']} calls, {size(kernel['bytes'])} moved "
        f"({_share(kernel['bytes'], step['moved_bytes'])}), {_share(kernel['flops'], step['flops'])} of the FLOPs"
        for name, kernel in sorted(step["kernels"].items())
    ]
    return "; ".join(each) or "none"


def _shares(figures: Figures) -> list[str]:
    words = {
        "flops": "FLOPs", "moved_bytes": "bytes moved", "collective_bytes": "bytes communicated",
        "peak_bytes": "peak memory", "seconds_apart": "time", "seconds_overlapped": "time with overlap",
    }  # fmt: skip
    each = [f"{share:.1%} of the {words[key]}" for key, share in figures["selection_share"].items()]
    every = figures["select_every"]
    where = "" if every == 1 else f" (one step in {every} chooses)"
    return [f"choosing is {', '.join(each)} of a step that does{where}"] if each else []


def largest_buffers(step: Figures) -> str:
    """Names of what takes most memory in a step that does not fit: the compiler's list, or else what is always held."""
    found: list[dict[str, Any]] = step["largest"] or step["held"]
    return ", ".join(f"{x['name']} ({size(x['bytes'])})" for x in found[:_NAMED])


def size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"
