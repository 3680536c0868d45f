"""`corpus.name = records`: a prepared corpus that is already there, in a folder or at an address.

It is what `opus-jax prepare` prints the place of, copied whole. From an address it is copied into the cache once, and
every file is compared with the SHA-256 in its manifest before any of it is used.
"""

import hashlib
import os
import shutil
from pathlib import Path

from opus_jax.config import Config
from opus_jax.data.cache import cache_folder
from opus_jax.data.folder_lock import folder_lock
from opus_jax.data.records import MANIFEST_FILE, Manifest
from opus_jax.data.remote import Remote, is_remote
from opus_jax.errors import ConfigError, UserError


def given_records(config: Config) -> Path:
    """The records folder at `corpus.path`, on this machine.

    Raises:
      ConfigError: its rows are not of `corpus.row_tokens` tokens.
      UserError: there is no prepared corpus, it cannot be copied, or a file is not what its manifest says.
    """
    path = str(config.corpus.path)
    folder = _copied(path, cache_folder(config.corpus)) if is_remote(path) else Path(path).expanduser()
    found = Manifest.load(folder).row_tokens
    if found != config.corpus.row_tokens:
        raise ConfigError("corpus.row_tokens", config.corpus.row_tokens, f"the rows of {path} have {found} tokens")
    return folder


def _copied(url: str, cache: Path) -> Path:
    """A copy, by the content of its manifest, so that an address which holds other records later is read again."""
    remote = Remote(url)
    if MANIFEST_FILE not in remote.list():
        raise UserError(f"{url} holds no prepared corpus ({MANIFEST_FILE} is absent): copy the whole folder there")
    manifest = remote.read(MANIFEST_FILE)
    folder = cache / "records" / f"copied-{hashlib.sha256(manifest).hexdigest()[:16]}"
    with folder_lock(folder):
        if not folder.exists():
            _copy(remote, manifest, folder)
    return folder


def _copy(remote: Remote, manifest: bytes, folder: Path) -> None:
    """Under another name until every hash is right."""
    for left in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(left)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        (partial / MANIFEST_FILE).write_bytes(manifest)
        named = Manifest.load(partial)  # it refuses names that lead out of the folder, before anything is copied there
        for name in named.files:
            remote.download(name, partial / name)
        named.check_contents(partial)
        os.rename(partial, folder)
    except UserError as error:
        raise UserError(f"the records at {remote.url} are not whole: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
