"""Files that lie elsewhere: gs://, s3:// and every other address that fsspec knows.

The network is touched only for paths with `://` in them. Everything is copied to this machine before it is read: rows
are read in random order, and a request for each would keep the devices waiting.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from opus_jax.data.folder_lock import folder_lock
from opus_jax.errors import MissingExtraError, UserError

EXTRA = "remote"
_BACKENDS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
# An object of these appears whole, when all of it has arrived; elsewhere a file is written beside and renamed.
_WHOLE = {"gs", "gcs", "s3", "s3a", "abfs", "az", "memory"}
_PARTIAL = ".partial-"
_LISTING = ".listing.json"
_CHANGES = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


def is_remote(path: str | Path | None) -> bool:
    return path is not None and "://" in str(path)


class Remote:
    """A folder (or file) at an address, through fsspec.

    Every method raises UserError, on one line, for whatever the place answers with; the address must hold no login.

    Raises:
      MissingExtraError: the package for this kind of address is not installed.
      UserError: no package knows this kind of address.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        scheme = urlsplit(url).scheme
        try:
            import fsspec

            # of our own: the shared one remembers listings, and another process may have changed them
            own = {"skip_instance_cache": True, "use_listings_cache": False}
            self._files, self._root = fsspec.core.url_to_fs(self.url, **own)
        except ImportError:
            raise MissingExtraError(self.url, _BACKENDS.get(scheme, "fsspec"), EXTRA) from None
        except ValueError as error:
            raise UserError(f"{self.url}: {_line(error)}; gs:// and s3:// are known") from None
        protocols = {self._files.protocol} if isinstance(self._files.protocol, str) else set(self._files.protocol)
        self._whole = bool(protocols & _WHOLE)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self._root).name or "root"

    def list(self) -> dict[str, dict[str, Any]]:
        """What is known of every file, by its path below the address; {"": ...} for a single file; {} for nothing."""
        with self._reached("list"):
            if self._files.isfile(self._root):
                return {"": self._files.info(self._root)}
            found = self._files.find(self._root, detail=True) if self._files.exists(self._root) else {}
        root = str(self._root).rstrip("/") + "/"
        names = {"/" + str(path).lstrip("/"): facts for path, facts in found.items()}
        listed = {path.removeprefix("/" + root.lstrip("/")): facts for path, facts in names.items()}
        for name in listed:
            if not is_inside(name):
                raise UserError(f"{self.url} lists {name!r}, which lies outside it")
        return {name: facts for name, facts in listed.items() if not PurePosixPath(name).name.startswith(_PARTIAL)}

    def read(self, name: str) -> bytes:
        with self._reached(f"read {name} from"):
            return self._files.cat_file(self._at(name))

    def download(self, name: str, file: Path) -> None:
        """Copy one file here; a torn copy is the caller's to prevent."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._reached(f"copy {name} from"):
            self._files.get_file(self._at(name), str(file))

    def upload(self, file: Path, name: str) -> None:
        """Copy one file there; it appears whole or not at all."""
        target = PurePosixPath(self._at(name))
        place = target if self._whole else target.with_name(f"{_PARTIAL}{target.name}")
        with self._reached(f"write {name} to"):
            self._files.makedirs(str(target.parent), exist_ok=True)
            self._files.put_file(str(file), str(place))
            if place != target:
                self._files.mv(str(place), str(target))

    def remove(self, name: str) -> None:
        with self._reached(f"delete {name} from"):
            self._files.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{str(self._root).rstrip('/')}/{name}" if name else str(self._root)

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every backend has its own classes
            raise UserError(f"cannot {what} {self.url}: {_line(error)}") from None


def local_copy(url: str, cache: Path) -> Path:
    """A file or folder, copied below `cache` once and again whenever the listing of its place has changed.

    Returns:
      The copy; its name is the last part of the address.

    Raises:
      UserError: there is nothing at the address, or it cannot be read.
    """
    remote = Remote(url)
    listed = remote.list()
    if not listed:
        raise UserError(f"{url} holds no file: give an address that does")
    listing = json.dumps({name: _version(facts) for name, facts in sorted(listed.items())})
    home = cache / "remote" / mark(url)
    with folder_lock(home):
        marker = home / _LISTING
        if not (marker.is_file() and marker.read_text() == listing):
            shutil.rmtree(home, ignore_errors=True)
            for name in listed:
                remote.download(name, home / remote.name / name)
            marker.write_text(listing)
    return home / remote.name


def mark(url: str) -> str:
    """A folder name for an address."""
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def is_inside(name: str) -> bool:
    """Whether a path from a list of files stays below the folder that it is put under."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or os.path.isabs(name))


def _version(facts: dict[str, Any]) -> list[str]:
    """What changes when a file does; places differ in what they tell."""
    return [str(facts.get("size")), *(str(facts[key]) for key in _CHANGES if facts.get(key) is not None)]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
