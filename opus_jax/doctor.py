"""`opus-jax doctor`: what this machine and installation have, what is wrong with them, and what to do about it."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from opus_jax.config import CorpusConfig
from opus_jax.data.cache import cache_folder
from opus_jax.distributed.platform import nvidia_devices, tpu_devices

GIB = 2**30
LEAST_MEMORY, LEAST_DISK = 3 * GIB, 2 * GIB
SUPPORTED_PYTHON = ((3, 11), (3, 13))
_DISTRIBUTION = "opus-jax"


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `problem` says what to do, and is an empty string where all is well."""

    name: str
    value: str
    problem: str = ""


def examine() -> int:
    """Print every finding; 0 when nothing is wrong, otherwise 1."""
    problems = 0
    for finding in findings():
        print(f"{'!!' if finding.problem else 'ok'}  {finding.name:<22}{finding.value}")
        if finding.problem:
            problems += 1
            print(f"    {'':<22}-> {finding.problem}")
    print("nothing to mend" if not problems else f"to mend: {problems}")
    return 1 if problems else 0


def findings() -> Iterator[Finding]:
    """All findings, the quick ones first."""
    yield _python()
    yield Finding("system", f"{platform.platform()}, {os.cpu_count()} cores")
    yield from _packages()
    yield from _extras()
    yield _devices()
    yield _memory()
    cache = cache_folder(CorpusConfig())
    yield _disk("cache", cache)
    yield _writable("cache", cache)
    yield _writable("run folders", Path("runs").resolve())


def _python() -> Finding:
    low, high = SUPPORTED_PYTHON
    fits = low <= sys.version_info[:2] <= high
    wanted = f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return Finding("Python", f"{platform.python_version()} at {sys.executable}", "" if fits else wanted)


# --------------------------------------------------------------------------------------------- packages


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(line) for line in importlib.metadata.requires(_DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _packages() -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        yield Finding(_DISTRIBUTION, "not installed", "in the checkout: make venv, or pip install -e .")
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_requirement(requirement)


def check_requirement(requirement: Requirement) -> Finding:
    """Whether a package is installed in a version that this one accepts."""
    name, allowed = requirement.name, str(requirement.specifier)
    advice = f'pip install "{name}{allowed}"'
    version = _installed(name)
    if version is None:
        return Finding(name, "not installed", advice)
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(name, version, "" if fits else f"version {allowed} is needed: {advice}")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[Finding]:
    """Extras are there for the asking, so a missing one is no problem."""
    for extra, missing in missing_by_extra(_requirements()).items():
        absent = f'no, for want of {", ".join(missing)}: pip install "opus-jax[{extra}]"'
        yield Finding(f"extra {extra}", absent if missing else "installed")


def missing_by_extra(requirements: list[Requirement]) -> dict[str, list[str]]:
    """Extra -> its packages that are not installed; a package's own extras (jax[tpu]) are looked into."""
    names = sorted({match for r in requirements if r.marker for match in _extra_names(str(r.marker))})
    missing: dict[str, list[str]] = {}
    for extra in names:
        wanted = [r for r in requirements if r.marker and _belongs(r, extra)]
        missing[extra] = sorted({name for r in wanted for name in _absent(r)})
    return missing


def _extra_names(marker: str) -> list[str]:
    return re.findall(r'extra == "([\w-]+)"', marker)


def _belongs(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _absent(requirement: Requirement) -> list[str]:
    if _installed(requirement.name) is None:
        return [requirement.name]
    inner = (
        [Requirement(line) for line in importlib.metadata.requires(requirement.name) or []]
        if requirement.extras
        else []
    )
    return [r.name for extra in requirement.extras for r in inner if _belongs(r, extra) and _installed(r.name) is None]


# ---------------------------------------------------------------------------------------------- machine


def _devices() -> Finding:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return Finding("devices", "none", f"JAX finds no device: {str(error).splitlines()[0]}")
    found = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    if devices[0].platform == "gpu":
        return Finding("devices", f"{found}, XLA_FLAGS = {os.environ.get('XLA_FLAGS', '')}")
    if devices[0].platform != "cpu":
        return Finding("devices", found)
    if tpu_devices():
        return Finding("devices", found, 'a TPU is here but is not used: pip install "opus-jax[tpu]"')
    if nvidia_devices():
        return Finding(
            "devices",
            found,
            'an NVIDIA GPU is here but is not used: make venv DEVICE=gpu, or pip install "opus-jax[gpu]"',
        )
    return Finding("devices", found)


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding("memory", f"{total / GIB:.1f} GiB", "" if total >= LEAST_MEMORY else "the quickstart needs 3 GiB")


def _disk(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    advice = f"free {LEAST_DISK // GIB} GiB there, or set OPUS_JAX_CACHE to another disk"
    return Finding(f"{name}: free disk", f"{free / GIB:.1f} GiB at {folder}", "" if free >= LEAST_DISK else advice)


def _writable(name: str, folder: Path) -> Finding:
    there = _existing(folder)
    fits = os.access(there, os.W_OK | os.X_OK)
    return Finding(
        f"{name}: writable",
        "yes" if fits else f"no: {there}",
        "" if fits else f"make {there} writable, or go elsewhere",
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
