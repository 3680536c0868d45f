"""Compiled programs as text (HLO), read back: computations, their instructions, and how often each one runs."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_CALLED = {
    "while": r"body=%?([\w.\-]+)",
    "fusion": r"calls=%?([\w.\-]+)",
    "call": r"to_apply=%?([\w.\-]+)",
    "call-start": r"to_apply=%?([\w.\-]+)",
    "async-start": r"calls=%?([\w.\-]+)",
}
_BRANCHES = r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=([^,\s]+))"
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclass(frozen=True)
class Shape:
    """One array. `space` is the memory that its layout names: 0 = main memory (HBM), 1 = a TPU's VMEM."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of the layout; an element of 4 bits takes half a byte."""
        bits = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or [0])[0])
        return self.size * bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line. `shapes` are the leaves of its result, `inside` what stands in the parentheses."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    inside: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.inside))

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """A module: its computations by name, the one that runs first, and for how many devices it was partitioned.

    Which branch of a conditional runs is not known: `longest` takes the one with most instructions, else the one with
    fewest, so that the two bound what can happen.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int = 1
    longest: bool = True

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often one execution of the program runs each computation.

        The body of a loop counts once for each of its trips, loops within loops multiply. The functions that
        reductions, sorts and loop conditions apply are not computations of their own.
        """
        counts: Counter[str] = Counter()
        self._count(self.entry, 1, counts)
        return dict(counts)

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations whose inner results never reach memory."""
        found = {name for line in self._lines() if line.opcode == "fusion" for name in self.called(line)}
        return frozenset(found)

    @property
    def unknown_loops(self) -> list[str]:
        """Loops that run whose number of trips is not known before they do; their bodies count once."""
        return [
            line.name for name in self.runs for line in self.computations[name].values()
            if line.opcode == "while" and self.trips(line) is None
        ]  # fmt: skip

    def called(self, line: Instruction) -> list[str]:
        """The computations that an instruction runs, of a conditional one branch."""
        if line.opcode == "conditional":
            found = re.search(_BRANCHES, line.attributes)
            assert found, f"conditional {line.name} has no branches"
            branches = [name.strip().lstrip("%") for group in found.groups() if group for name in group.split(",")]
            return [(max if self.longest else min)(branches, key=self._length)]
        if (pattern := _CALLED.get(line.opcode)) is None:
            return []
        return re.findall(pattern, line.attributes)

    def trips(self, loop: Instruction) -> int | None:
        """What the compiler states, or the one whole number that the loop's condition compares with `<`."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if stated:
            return int(stated[1])
        found = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        assert found, f"loop {loop.name} has no condition"
        lines = list(self._with_fused(found[1]))
        below = [line for line in lines if line.opcode == "compare" and "direction=LT" in line.attributes]
        limits = [int(x.inside) for x in lines if x.opcode == "constant" and x.inside.isdigit()]
        return limits[0] if len(below) == len(limits) == 1 else None

    def _count(self, name: str, times: int, counts: Counter[str]) -> None:
        counts[name] += times
        for line in self.computations[name].values():
            inner = (self.trips(line) or 1) if line.opcode == "while" else 1
            for called in self.called(line):
                self._count(called, times * inner, counts)

    def _length(self, name: str) -> int:
        """Instructions that one run of a computation executes."""
        counts: Counter[str] = Counter()
        self._count(name, 1, counts)
        return sum(times * len(self.computations[called]) for called, times in counts.items())

    def _lines(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def _with_fused(self, name: str) -> Iterator[Instruction]:
        for line in self.computations[name].values():
            yield line
            if line.opcode == "fusion":
                for called in self.called(line):
                    yield from self._with_fused(called)


def parse(text: str) -> Program:
    """Read the text of a compiled program (`compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction is not None:
                computations[current][instruction.name] = instruction
        elif header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
    partitions = re.search(r"^HloModule .*num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    inside, attributes = rest[opening:], ""
    closing = _closing(inside)
    inside, attributes = inside[1:closing], inside[closing + 1 :]
    return Instruction(start[2], _shapes(shapes), rest[:opening], inside, attributes, bool(start[1]))


def _closing(text: str) -> int:
    """Where the parenthesis that opens a text is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed in a compiled program: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Shape(dtype, tuple(map(int, filter(None, dims.split(",")))), int(space[1]) if space else 0))
    return tuple(found)
