"""What a run was made with: versions, devices, source commit, and the settings that reach JAX by the environment."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = (
    "opus-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "sentencepiece",
    "numpy", "pyarrow", "libtpu",
)  # fmt: skip
_VARIABLES = (
    "JAX_",
    "XLA_",
    "LIBTPU_",
    "TPU_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "MEGASCALE_",
    "OPUS_JAX_",
    "SLURM_",
)

REDACTED = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH", "COOKIE", "SIGNATURE")
"""A variable or option whose name contains one of these, in any case, is written as `<redacted>`."""

_HIDDEN = "<redacted>"
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_NAMED_VALUE = re.compile(r"(?i)([\w.-]*(?:" + "|".join(REDACTED) + r")[\w.-]*\s*[=:]\s*)(\S+)")


def describe_environment() -> dict[str, Any]:
    """The contents of environment.json; secrets are redacted by `redact`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "devices": {
            "backend": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git": _git(Path(__file__).resolve().parent),
        "command": redact_arguments(sys.argv),
        "variables": {
            name: redact(name, value) for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
        "redacted_names": list(REDACTED),
    }


def redact(name: str, value: str) -> str:
    """`value`, or a placeholder if the name sounds secret; logins in URLs and `secret=...` inside it are hidden too."""
    if any(word in name.upper() for word in REDACTED):
        return _HIDDEN
    return _NAMED_VALUE.sub(rf"\g<1>{_HIDDEN}", _LOGIN_IN_URL.sub(_HIDDEN, value))


def redact_arguments(arguments: list[str]) -> list[str]:
    """A command line with secrets hidden, also where name and value are two arguments (`--token abc`)."""
    before = ["", *arguments]
    return [
        redact(name if name.startswith("-") and "=" not in name else "", value)
        for name, value in zip(before, arguments, strict=False)
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the source tree and whether it was changed; None when it is not in git."""
    git = ["git", "-C", str(folder)]
    # an installed copy may lie inside the repository of something else
    if not _output([*git, "ls-files", "--", Path(__file__).name]):
        return None
    changed = _output([*git, "status", "--porcelain", "--", str(folder.parent)])
    return {"commit": _output([*git, "rev-parse", "HEAD"]), "changed": bool(changed)}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
