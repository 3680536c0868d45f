"""Arithmetic and traffic of compiled programs, counted from their text with the trips of loops.

The compiler's own cost analysis takes the body of a loop once; a model whose layers are scanned has nearly all its
work in such bodies.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opus_jax.distributed.hlo import COLLECTIVES
from opus_jax.distributed.hlo_text import Computation, Instruction, Program, parse

KERNEL = "tpu_custom_call"
_PASSES = {"highest": 6, "high": 3}  # of a TPU's matrix unit over bfloat16 parts of float32 factors
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "call-start", "async-start", "opt-barrier",
    *COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES),
}  # fmt: skip
_MOVERS = ("dynamic-slice", "slice", "slice-start", "gather")  # read only what they give
_RENAMED = ("bitcast", "reshape", "get-tuple-element")


@dataclass(frozen=True)
class Work:
    """One instruction that runs on its own, a fusion being one.

    Attributes:
      flops: of its products (dots, convolutions, and what a kernel states), a multiply and an add counted as two.
      passes: the same, counted as often as the matrix unit goes over them for a higher precision.
      bytes: read from and written to main memory; of a slice of a stacked array only the slice.
      count: runs in one execution of the program.
      kernel: name, where it is one of our kernels.
    """

    flops: int
    passes: int
    bytes: int
    count: int
    kernel: str | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over one execution of a program, on one device."""

    flops: int
    bytes: int
    kernels: dict[str, dict[str, int]]  # name -> calls, flops, bytes


def totals(program: str | Program) -> Totals:
    """Arithmetic and traffic of one execution (HLO text, or that parsed), loops counted with their trips."""
    works = list(work(program))
    kernels: dict[str, dict[str, int]] = {}
    for item in works:
        if item.kernel is not None:
            kernel = kernels.setdefault(item.kernel, {"calls": 0, "flops": 0, "bytes": 0})
            kernel["calls"] += item.count
            kernel["flops"] += item.count * item.flops
            kernel["bytes"] += item.count * item.bytes
    return Totals(sum(x.flops * x.count for x in works), sum(x.bytes * x.count for x in works), kernels)


def work(program: str | Program) -> Iterator[Work]:
    """What every instruction of a program does, collectives left out."""
    parsed = parse(program) if isinstance(program, str) else program
    counter = _Counter(parsed)
    for name, count in parsed.runs.items():
        if name not in parsed.fused:
            for line in parsed.computations[name].values():
                if line.opcode not in _FREE and not line.opcode.endswith("-done"):
                    yield counter.work(line, parsed.computations[name], count)


@dataclass(frozen=True)
class _Counter:
    program: Program

    def work(self, line: Instruction, computation: Computation, count: int) -> Work:
        if line.opcode == "custom-call":
            return self._custom(line, computation, count)
        flops, passes = self.products(line, computation)
        return Work(flops, passes, self.bytes(line, computation), count)

    def products(self, line: Instruction, computation: Computation) -> tuple[int, int]:
        """(FLOPs, the same times passes) of a product, or of all within a fusion."""
        if line.opcode == "fusion":
            inner = [self.program.computations[name] for name in self.program.called(line)]
            each = [self.products(part, body) for body in inner for part in body.values()]
            return sum(flops for flops, _ in each), sum(passes for _, passes in each)
        if line.opcode not in ("dot", "convolution"):
            return 0, 0
        shapes = [computation[name].shapes[0].dims for name in line.operands]
        flops = (dot_flops if line.opcode == "dot" else convolution_flops)(line, *shapes)
        precision = re.search(r"operand_precision=\{(\w+)", line.attributes)
        return flops, flops * _PASSES.get(precision[1] if precision else "", 1)

    def bytes(self, line: Instruction, computation: Computation) -> int:
        """To and from main memory."""
        read = 0
        for place, name in enumerate(line.operands):
            if _in_memory(computation[name]):
                read += self._read_by(line, place, computation[name].bytes)
        return read + self._written(line, computation)

    def _read_by(self, line: Instruction, place: int, size: int) -> int:
        """Of an operand of so many bytes."""
        if line.opcode in _MOVERS and place == 0:
            return min(size, line.shapes[0].bytes)
        if line.opcode == "dynamic-update-slice" and place == 0:
            return 0
        if line.opcode == "fusion":
            (called,) = self.program.called(line)
            body = self.program.computations[called]
            inner = [x for x in body.values() if x.opcode == "parameter" and x.inside == str(place)]
            return min(size, sum(self._read_of(x.name, called) for x in inner))
        return size

    def _read_of(self, name: str, called: str) -> int:
        """Of a value, by all its users within a fused computation."""
        body = self.program.computations[called]
        size, read = body[name].bytes, 0
        for user in body.values():
            for place in (at for at, operand in enumerate(user.operands) if operand == name):
                if user.opcode in _RENAMED:
                    read += self._read_of(user.name, called)
                elif user.opcode != "tuple":
                    read += self._read_by(user, place, size)
        return min(size, read)

    def _written(self, line: Instruction, computation: Computation) -> int:
        """Of a result: an array that is changed in place costs what is put into it."""
        if line.opcode == "dynamic-update-slice":
            return computation[line.operands[1]].bytes if _in_memory(line) else 0
        if line.opcode in ("copy-start", "slice-start"):
            return line.shapes[0].bytes if line.shapes[0].space == 0 else 0
        if line.opcode != "fusion":
            return sum(shape.bytes for shape in line.shapes if shape.space == 0)
        (called,) = self.program.called(line)
        body = self.program.computations[called]
        (root,) = (x for x in body.values() if x.root)
        leaves = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        if len(leaves) != len(line.shapes):
            return sum(shape.bytes for shape in line.shapes if shape.space == 0)
        return sum(
            min(shape.bytes, self._put(leaf, body))
            for leaf, shape in zip(leaves, line.shapes, strict=True) if shape.space == 0
        )  # fmt: skip

    def _put(self, leaf: Instruction, body: Computation) -> int:
        """Bytes that one result of a fusion puts into memory."""
        while leaf.opcode in _RENAMED and leaf.operands and leaf.opcode != "get-tuple-element":
            leaf = body[leaf.operands[0]]
        return body[leaf.operands[1]].bytes if leaf.opcode == "dynamic-update-slice" else leaf.bytes

    def _custom(self, line: Instruction, computation: Computation, count: int) -> Work:
        """A kernel's costs are those that it states; a kernel that states none has its operands and results moved."""
        if f'custom_call_target="{KERNEL}"' not in line.attributes:
            return Work(0, 0, 0, count)
        stated = re.search(r'"cost_estimate":\{([^}]*)\}', line.attributes)
        costs = dict(re.findall(r'"(\w+)":"(\d+)"', stated[1] if stated else ""))
        flops = int(costs.get("flops", 0))
        moved = int(costs.get("bytes_accessed", self.bytes(line, computation)))
        return Work(flops, flops, moved, count, kernel=line.name.split(".")[0])


def dot_flops(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """2 x elements of the result x length of what is summed over."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
    summed = [left[int(axis)] for axis in (found[1] if found else "").split(",") if axis]
    return 2 * line.shapes[0].size * math.prod(summed)


def convolution_flops(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Products with elements that are there, none with padding; TPUs write batched dots as dilated convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    assert labels, f"convolution {line.name} does not name its dimensions"
    ins, kernel, outs = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    out = line.shapes[0].dims
    touched = 1
    for axis in range(len(out) - 2):
        sizes = left[ins.index(str(axis))], right[kernel.index(str(axis))], out[outs.index(str(axis))]
        touched *= _touched(*sizes, {key: value.split("x")[axis] for key, value in settings.items()})
    groups = re.search(r"batch_group_count=(\d+)", line.attributes)
    batch = left[ins.index("b")] // (int(groups[1]) if groups else 1)
    return 2 * batch * out[outs.index("f")] * right[kernel.index("i")] * touched


def _touched(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of a place in the output and one in the kernel that meet an element of the input, along one axis."""
    stride, dilated, spread = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - before
    return int(((place >= 0) & (place % dilated == 0) & (place // dilated < size)).sum())


def _in_memory(line: Instruction) -> bool:
    return any(shape.space == 0 for shape in line.shapes)
