"""One process at a time fills a folder of the cache; the others wait for it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opus_jax.errors import UserError


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process dies, however it dies.

    Raises:
      UserError: the place of `folder` cannot be written or locked.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_name(f".{folder.name}.lock").open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(
            f"{folder.parent} cannot be written or locked ({error.strerror}): set corpus.cache_dir"
        ) from None
    with file:
        yield
