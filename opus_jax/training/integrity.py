"""Sizes and hashes of a checkpoint's files, because the format itself does not notice a flipped bit.

The hashes of step s lie in `checkpoints/integrity/<s>.json`, outside the step's folder, and are written after
the step is committed: a step without them was finished, but its process died before it was hashed.
"""

import hashlib
import json
from pathlib import Path

from opus_jax.training.atomic import remove_partial_files, write_atomic

FOLDER = "integrity"


def write_hashes(directory: Path, step: int) -> None:
    """Hash every file of `directory/<step>` and write the list atomically.

    Raises:
      OSError: a file cannot be read, or the list cannot be written.
    """
    folder = directory / str(step)
    files = {str(file.relative_to(folder)): _size_and_hash(file) for file in _files(folder)}
    (directory / FOLDER).mkdir(exist_ok=True)
    write_atomic(_list_of(directory, step), json.dumps({"step": step, "files": files}, indent=1))


def has_hashes(directory: Path, step: int) -> bool:
    return _list_of(directory, step).is_file()


def hashed_steps(directory: Path) -> list[int]:
    """Steps that were complete once, whether or not their folders still exist."""
    return sorted(int(file.stem) for file in (directory / FOLDER).glob("*.json") if file.stem.isdigit())


def problems(directory: Path, step: int) -> list[str]:
    """What is wrong with the files of a step, in words; empty when every byte is as it was written.

    A step without hashes has no known problem unless its folder is empty.
    """
    folder = directory / str(step)
    present = {str(file.relative_to(folder)): file for file in _files(folder)}
    if not present:
        return ["the folder is empty"]
    if not has_hashes(directory, step):
        return []
    try:
        expected = json.loads(_list_of(directory, step).read_text())["files"]
    except (ValueError, KeyError) as error:
        return [f"the list of hashes is not readable ({error})"]
    missing = [f"{name} is missing" for name in expected if name not in present]
    wrong = [_difference(name, present[name], *expected[name]) for name in expected if name in present]
    return missing + [line for line in wrong if line]


def remove_orphans(directory: Path) -> None:
    """Delete lists whose step is gone, and half-written ones."""
    for step in hashed_steps(directory):
        if not (directory / str(step)).is_dir():
            _list_of(directory, step).unlink(missing_ok=True)
    remove_partial_files(directory / FOLDER)


def _list_of(directory: Path, step: int) -> Path:
    return directory / FOLDER / f"{step}.json"


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _size_and_hash(file: Path) -> tuple[int, str]:
    with file.open("rb") as handle:
        return file.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()


def _difference(name: str, file: Path, size: int, digest: str) -> str:
    try:
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        return "" if _size_and_hash(file)[1] == digest else f"{name} has changed since it was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
