"""A run folder: who may write to it, what it was made from, and how it ended."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf

from opus_jax.config import Config, changed_keys
from opus_jax.errors import UserError
from opus_jax.training.atomic import write_atomic
from opus_jax.training.environment import describe_environment
from opus_jax.training.run_lock import run_lock
from opus_jax.training.strict_json import encode

CONFIG, ENVIRONMENT, RECORDS, SUMMARY = "config.yaml", "environment.json", "records.json", "summary.json"


@contextmanager
def open_run_folder(run_dir: str | Path, config: Config) -> Iterator[Path]:
    """Make the folder if needed, hold it for this process, and write config.yaml and environment.json.

    Only process 0 of several writes and holds the lock.

    Raises:
      UserError: the folder cannot be made, another process trains in it, or its configuration differs.
    """
    folder = Path(run_dir)
    if jax.process_index() != 0:
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder} ({error.strerror}): choose another run.dir") from None
    with run_lock(folder):
        refuse_changed_config(folder, config)
        if not has_begun(folder):
            write_atomic(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config.to_mapping())))
        write_atomic(folder / ENVIRONMENT, encode(_with_earlier(folder, describe_environment()), indent=1))
        yield folder


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
