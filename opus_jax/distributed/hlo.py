"""Communication in compiled programs: which collectives one execution runs, over which axes of the mesh, how large."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from opus_jax.distributed.hlo_text import Computation, Instruction, Program, parse

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=(\{\}|\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\](?:, device_ids=\(.*?\)+)? \{.*?\})"
)


@dataclass(frozen=True, order=True)
class Collective:
    """Equal collectives of one program.

    Attributes:
      kind: one of COLLECTIVES.
      axes: mesh axes along which devices talk, in the mesh's order.
      bytes: of one run, on one device: what goes in, or of an all-gather what comes out.
      count: runs in one execution of the program, trips of loops included.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int

    @property
    def moved(self) -> int:
        """Bytes of all runs."""
        return self.bytes * self.count


@dataclass(frozen=True)
class Site:
    """One collective instruction: as `Collective`, and where in the traced function it comes from."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    count: int
    op_name: str


def collectives(program: str | Program, mesh: Any) -> list[Collective]:
    """The collectives of a compiled program, equal ones together, in order of kind, axes and bytes.

    Args:
      program: `compiled.as_text()`, or that parsed.
      mesh: that it was compiled for; device i of the program is `mesh.devices.flat[i]`.
    """
    found: Counter[tuple[str, tuple[str, ...], int]] = Counter()
    for site in sites(program, mesh):
        found[(site.kind, site.axes, site.bytes)] += site.count
    return sorted(Collective(*key, count) for key, count in found.items())


def sites(program: str | Program, mesh: Any) -> list[Site]:
    """Every collective instruction that runs; those among a single device move nothing and are left out.

    The program of a TPU slice that is one of several talks to the others by sending to their hosts: these are
    collectives along the mesh's first axis, on which slices lie.
    """
    parsed = parse(program) if isinstance(program, str) else program
    found = []
    for name, count in parsed.runs.items():
        computation = parsed.computations[name]
        for line in computation.values():
            if line.opcode == "send" and (sent := re.search(r'_megascale_transfer_type="(\w+)"', line.attributes)):
                kind = sent[1].lower().replace("_", "-")
                size = payload(kind, line, computation, math.prod(mesh.shape.values()) // parsed.devices)
                found.append(Site(kind, tuple(mesh.shape)[:1], size, count, line.op_name))
            kind = line.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            groups = device_groups(line.attributes, parsed.devices)
            if groups.shape[1] > 1:
                kind = _fused_kind(kind, line, computation, name in parsed.fused)
                size = payload(kind, line, computation, groups.shape[1])
                found.append(Site(kind, spanned_axes(groups, mesh), size, count, line.op_name))
    return found


def payload(kind: str, line: Instruction, computation: Computation, group: int) -> int:
    """Bytes of the whole result of an all-gather among `group` devices, or else of what goes in."""
    given = sum(computation[name].bytes for name in line.operands)
    return given * group if kind == "all-gather" else given


def device_groups(attributes: str, devices: int) -> Int[np.ndarray, "groups members"]:
    """Who talks to whom; of a permutation, the pairs that differ."""
    found = _GROUPS.search(attributes)
    if found is None:
        raise ValueError(f"a collective names no devices: {attributes[:200]}")
    text = found[1]
    if text == "{}":
        return np.arange(devices)[None]
    if text.startswith("{{"):
        listed = np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)])
        return listed[listed[:, 0] != listed[:, 1]] if found[0].startswith("source") else listed
    return _of_axes(text) if text.startswith("mesh") else _of_iota(text)


def _of_iota(text: str) -> Int[np.ndarray, "groups members"]:
    """`[4,2]<=[2,4]T(1,0)`: count up in the second shape, transpose, reshape to the first."""
    shape, counted = text.split("<=")
    return _counted(counted).reshape(_numbers(shape))


def _of_axes(text: str) -> Int[np.ndarray, "groups members"]:
    """`mesh['a'=2,'b'=4] {'b'}`: devices that differ along the named axes; `'b':(2)2` is the last half of b's size.

    `device_ids` says which devices make the mesh, where they do not simply count up.
    """
    found = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}", text)
    assert found, f"groups of devices of an unknown form: {text}"
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    ids = np.arange(math.prod(sizes.values()))
    if found[2]:
        ids = _counted(found[2]) if "[" in found[2] else np.array(_numbers(found[2]))
    ids = ids.reshape(tuple(sizes.values()))
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3]):
        # The named axes go last, one after the other; what is left of a split axis stays in front.
        at = list(sizes).index(name)
        first, middle = (int(before), int(part)) if part else (1, sizes[name])
        ids = ids.reshape(*ids.shape[:at], first, middle, sizes[name] // first // middle, *ids.shape[at + 1 :])
        ids = np.moveaxis(ids, at + 1, -1)
        ids = ids.reshape(*ids.shape[:at], -1, *ids.shape[at + 2 :])
        sizes[name] = ids.shape[at]
    return ids.reshape(math.prod(sizes.values()), -1)


def _counted(text: str) -> Int[np.ndarray, "..."]:
    """`[2,4]T(1,0)`: count up in the shape, transpose."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def spanned_axes(groups: Int[np.ndarray, "groups members"], mesh: Any) -> tuple[str, ...]:
    """Axes of the mesh along which the devices of a group differ."""
    names, sizes = tuple(mesh.shape), tuple(mesh.shape.values())
    places = np.stack(np.unravel_index(groups, sizes))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, moves in zip(names, differ, strict=True) if moves)


def _fused_kind(kind: str, line: Instruction, computation: Computation, fused: bool) -> str:
    """A TPU's reduce-scatter is an all-reduce of whose results a fusion keeps slices."""
    if kind != "all-reduce" or not fused:
        return kind
    parts = {user.name for user in computation.values() if user.opcode == "get-tuple-element"}
    results = {line.name} | {name for name in parts if line.name in computation[name].operands}
    users = [x for x in computation.values() if x.name not in results and results & set(x.operands)]
    return "reduce-scatter" if users and all(user.opcode == "dynamic-slice" for user in users) else kind
