"""Download and unpack Debian packages without root and without touching the system's own package lists."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from opus_jax.errors import UserError

_INSTEAD = "use a Debian or Ubuntu system, or corpus.name = python-env or local"


class Apt:
    """apt with its state (lists of packages, caches) in a private folder."""

    def __init__(self, state: Path):
        """Fetches the newest lists of packages.

        Raises:
          UserError: apt is not installed, or its sources cannot be reached.
        """
        require_programs("apt-get", "apt-cache")
        self._options = _private_options(state)
        _run(["apt-get", *self._options, "update"], "fetching the lists of packages")

    def resolve(self, patterns: Iterable[str]) -> dict[str, str]:
        """The package that each pattern (an expression for the whole name) stands for: the one of highest version.

        Raises:
          UserError: no package of this release matches.
        """
        patterns = list(patterns)
        listing = _run(
            ["apt-cache", *self._options, "search", "--names-only", f"^({'|'.join(patterns)})$"], "searching"
        )
        names = [line.split(" - ")[0].strip() for line in listing.splitlines()]
        resolved = {}
        for pattern in patterns:
            found = [name for name in names if re.fullmatch(pattern, name)]
            if not found:
                raise UserError(
                    f"no package named {pattern!r} in apt's sources: leave its domain out of corpus.domains"
                )
            resolved[pattern] = max(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
        return resolved

    def download(self, package: str, folder: Path) -> Path:
        """The package's file in `folder`, as apt verified it against the signed lists."""
        folder.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", *self._options, "download", package], f"downloading {package}", cwd=folder)
        found = list(folder.glob(f"{package}_*.deb"))
        if len(found) != 1:
            raise UserError(f"apt-get download {package} left {len(found)} files in {folder}; delete it and try again")
        return found[0]


def require_programs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            raise UserError(f"corpus.name = debian needs the program {program}, which is not installed: {_INSTEAD}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .deb; links that lead out of `folder` are removed before anything is read."""
    require_programs("dpkg-deb")
    _run(["dpkg-deb", "-x", str(archive), str(folder)], f"unpacking {archive.name}")
    root = folder.resolve()
    for path in list(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            path.unlink()


def pip_download(project: str, folder: Path) -> Path:
    """The newest wheel of a project, alone. Its Python version is fixed, so every interpreter gets the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", "--dest", str(folder), "--quiet"]
    _run([sys.executable, "-m", "pip", "download", *options, project], f"downloading {project} (with pip)")
    return next(folder.glob("*.whl"))


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _private_options(state: Path) -> list[str]:
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "Dir::State": str(state),
        "Dir::State::status": str(state / "status"),
        "Dir::Cache": str(state / "cache"),
        "Debug::NoLocking": "true",
        "APT::Sandbox::User": "",  # the folder belongs to the user who runs this
    }
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


def _run(command: list[str], doing: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith(("E:", "ERROR"))] or said
        raise UserError(
            f"{doing} failed ({' '.join(command[:1])}): {errors[-1] if errors else 'no message'}; {_INSTEAD}"
        )
    return done.stdout
