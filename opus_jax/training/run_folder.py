"""A run folder: who may write to it, what it was made from, and how it ended."""

import errno
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf

from opus_jax.config import Config, changed_keys
from opus_jax.data.records import sha256
from opus_jax.distributed.agreement import of_first, same_fate
from opus_jax.errors import UserError
from opus_jax.training.atomic import write_atomic
from opus_jax.training.environment import describe_environment
from opus_jax.training.run_lock import run_lock
from opus_jax.training.strict_json import encode

CONFIG, ENVIRONMENT, RECORDS, SUMMARY = "config.yaml", "environment.json", "records.json", "summary.json"

_VISIBLE_SECONDS = 60.0  # network file systems show a new file late


@contextmanager
def open_run_folder(run_dir: str | Path, config: Config) -> Iterator[Path]:
    """Make the folder if needed, hold it for this run, and write config.yaml and environment.json.

    Only process 0 of several writes and holds the lock.

    Raises:
      UserError: the folder cannot be made, another run holds it, its configuration differs, or a process does not see
        it.
    """
    folder = Path(run_dir)
    with ExitStack() as held:
        with same_fate():
            if jax.process_index() == 0:
                held.enter_context(_held(folder, config))
        _require_shared(folder)
        yield folder


@contextmanager
def _held(folder: Path, config: Config) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder} ({error.strerror}): choose another run.dir") from None
    with run_lock(folder):
        refuse_changed_config(folder, config)
        write_atomic(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config.to_mapping())))
        write_atomic(folder / ENVIRONMENT, encode(_with_earlier(folder, describe_environment()), indent=1))
        yield


def _require_shared(folder: Path) -> None:
    """Raise UserError in every process unless all see what process 0 has just written, if need be a little later."""
    written = of_first(lambda: sha256(folder / ENVIRONMENT))
    deadline = time.monotonic() + _VISIBLE_SECONDS
    with same_fate():
        while not ((folder / ENVIRONMENT).is_file() and sha256(folder / ENVIRONMENT) == written):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder.absolute()} on {socket.gethostname()} is not the folder that process 0 writes to: "
                    "run.dir must be on a disk that all machines share, under the same path"
                )
            time.sleep(0.1)


@contextmanager
def needing_space(folder: Path) -> Iterator[None]:
    """Raise UserError for a log that cannot be written in the block because the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): free some space; the same command then goes on from the "
            "newest checkpoint"
        ) from error


def refuse_changed_config(run_dir: str | Path, config: Config) -> None:
    """Do nothing if the folder is new, was made by the same configuration, or holds no checkpoint yet.

    Raises:
      UserError: some keys differ; the message lists each as `key: old -> new`.
    """
    file = Path(run_dir) / CONFIG
    if not (file.is_file() and has_begun(run_dir)):
        return
    old = Config.load(file)
    changed = [f"{key}: {_value(old, key)} -> {_value(config, key)}" for key in changed_keys(old, config)]
    if changed:
        raise UserError(
            f"{run_dir} holds a run with another configuration ({'; '.join(changed)}): "
            "set these back, or choose another run.dir"
        )


def has_begun(run_dir: str | Path) -> bool:
    """Whether there is anything to go on from: a mistake that ends a run at once must not bind the next one."""
    return any((Path(run_dir) / "checkpoints").glob("*"))


def write_records_place(run_dir: str | Path, records: Path, fingerprint: str) -> None:
    """Note which prepared corpus the example ids of the selection log belong to. Only process 0 writes."""
    if jax.process_index() == 0:
        named = {"folder": str(records.absolute()), "fingerprint": fingerprint}
        write_atomic(Path(run_dir) / RECORDS, encode(named, indent=1) + "\n")


def read_summary(run_dir: str | Path) -> dict[str, Any] | None:
    """summary.json of a finished run, else None."""
    file = Path(run_dir) / SUMMARY
    return json.loads(file.read_text()) if file.is_file() else None


def write_summary(run_dir: str | Path, summary: dict[str, Any]) -> None:
    """Write summary.json whole; a number that is not finite becomes null and is named under `nonfinite`."""
    write_atomic(Path(run_dir) / SUMMARY, encode(summary, indent=1) + "\n")


def _value(config: Config, key: str) -> Any:
    """The value at a dotted key; a mapping's own keys may hold dots."""
    value: Any = config.to_mapping()
    while key:
        name = next((name for name in value if key == name or key.startswith(f"{name}.")), None)
        if name is None:
            return "absent"
        value, key = value[name], key[len(name) + 1 :]
        if not isinstance(value, dict):
            return json.dumps(value) if key == "" else "absent"
    return json.dumps(value)


def _with_earlier(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """A run resumed elsewhere keeps the description of where it was before."""
    file = folder / ENVIRONMENT
    try:
        before = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError:
        before = {}
    earlier = before.pop("earlier", [])
    if before and before != json.loads(encode(now)):
        earlier.append(before)
    return now | {"earlier": earlier}
