"""A run folder that lies elsewhere: trained in a copy on this machine, which is sent there at every save.

What is at the address is the run. A start throws the copy away and fetches the run; a checkpoint counts there when its
list of hashes has arrived, which is sent after its files, and its logs before them. So a process can be killed at any
moment and the run goes on from the address, on this machine or another.
"""

import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

import jax

from opus_jax.data.remote import Remote, mark
from opus_jax.errors import UserError
from opus_jax.training import atomic, integrity, run_lock
from opus_jax.training.checkpoint_format import TEMPORARY
from opus_jax.training.run_folder import SUMMARY

_CHECKPOINTS = "checkpoints"


class RemoteRun:
    """The copy of a run; a context manager that holds it for this process and sends what is new when it is left.

    Args:
      url: `run.dir`.
      cache: the copy lies below it.

    Attributes:
      folder: the copy, a run folder like any other.

    Raises:
      UserError: another process of this machine trains the run, its place cannot be reached, or there are several
        processes, which may be on several machines that would have a copy each.
    """

    def __init__(self, url: str, cache: Path):
        if jax.process_count() > 1:
            raise UserError(
                f"run.dir = {url}: several processes save into one folder, so it must be a path that all of them see: "
                "mount the bucket (gcsfuse, mountpoint-s3) or a shared disk, and name the path"
            )
        self._remote = Remote(url)
        self._home = cache / "remote" / f"run-{mark(url)}"
        self.folder = self._home / self._remote.name
        self._sent: dict[str, tuple[int, int] | None] = {}
        self._sending = threading.Lock()
        self._lock = run_lock.run_lock(self._home)

    def __enter__(self) -> "RemoteRun":
        self._home.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            self._fetch()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None or isinstance(error, Exception):
                self.send()
        except UserError:
            if error is None:
                raise
            # the error already on its way is the one to report
        finally:
            self._lock.__exit__(None, None, None)

    def send(self) -> None:
        """Copy there what has changed here, and delete there what is gone here.

        Raises:
          UserError: a file could not be written there; everything is still in `folder`.
        """
        with self._sending:
            present = _files(self.folder)
            changed = [name for name in sorted(present, key=_order) if self._sent.get(name) != present[name]]
            for name in changed:
                try:
                    self._remote.upload(self.folder / name, name)
                except UserError:
                    if (self.folder / name).is_file():
                        raise
                    continue  # an old checkpoint was removed meanwhile
                self._sent[name] = present[name]
            for name in sorted(self._sent.keys() - present.keys(), key=_order, reverse=True):
                self._remote.remove(name)
                del self._sent[name]

    def _fetch(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        listed = set(self._remote.list())
        whole = {name for name in listed if _is_whole(name, listed)}
        for name in sorted(whole):
            self._remote.download(name, self.folder / name)
        self._sent = dict.fromkeys(listed - whole) | _files(self.folder)


def fetched_run(url: str, cache: Path, *, checkpoints: bool) -> Path:
    """A copy of a run to read: for reports, evaluation and the like; `checkpoints` are large and not always needed.

    Raises:
      UserError: there is no run at the address, or it cannot be reached.
    """
    remote = Remote(url)
    listed = set(remote.list())
    if "config.yaml" not in listed:
        raise UserError(f"{url} is not a run folder (config.yaml is absent): give the run.dir of a training run")
    folder = cache / "remote" / f"read-{mark(url)}" / remote.name
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted(name for name in listed if _is_whole(name, listed)):
        if checkpoints or not name.startswith(f"{_CHECKPOINTS}/"):
            remote.download(name, folder / name)
    return folder


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that is part of the run: no lock, nothing half made, only checkpoints with hashes."""
    found: dict[str, tuple[int, int]] = {}
    for file in folder.rglob("*"):
        try:
            facts = file.stat()
        except FileNotFoundError:  # removed by a checkpoint in the background
            continue
        if file.is_file() and file.name != run_lock.NAME and not file.name.startswith(atomic.TEMPORARY):
            found[file.relative_to(folder).as_posix()] = (facts.st_size, facts.st_mtime_ns)
    return {name: facts for name, facts in found.items() if _is_whole(name, found.keys())}


def _is_whole(name: str, names: Collection[str]) -> bool:
    """Whether a file is of no checkpoint, or of one whose list of hashes is there too."""
    parts = name.split("/")
    if parts[0] != _CHECKPOINTS or len(parts) < 3 or parts[1] == integrity.FOLDER:
        return TEMPORARY not in name
    return parts[1].isdigit() and f"{_CHECKPOINTS}/{integrity.FOLDER}/{parts[1]}.json" in names


def _order(name: str) -> int:
    """Logs, then checkpoints, then what says that these are whole, then that the run has ended."""
    parts = name.split("/")
    if parts[0] == _CHECKPOINTS:
        return 2 if parts[1] == integrity.FOLDER else 1
    return 3 if name == SUMMARY else 0
