"""A file appears whole or not at all, whatever kills the process."""

import os
import tempfile
from pathlib import Path

TEMPORARY = ".partial-"


def write_atomic(file: str | Path, content: str | bytes) -> None:
    """Replace `file` by `content` in one step, on disk before the name changes.

    Raises:
      OSError: the disk is full or not writable; the old file is left as it was.
    """
    file = Path(file)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())
        # mkstemp makes files that only their owner may read, which surprises whoever shares a run folder
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_partial_files(folder: str | Path) -> None:
    """Delete what a process killed inside `write_atomic` left in `folder`."""
    for file in Path(folder).glob(TEMPORARY + "*"):
        file.unlink(missing_ok=True)
