"""Where the prepared corpus of a run lies, if it is still on this machine."""

import json
from pathlib import Path

from opus_jax.data.records import Manifest
from opus_jax.errors import UserError
from opus_jax.training.run_folder import RECORDS


def records_folder(run_folder: Path) -> Path:
    """The prepared corpus that a run was trained on.

    Raises:
      UserError: it is not on this machine, or its place now holds another corpus.
    """
    try:
        named = json.loads((run_folder / RECORDS).read_text())
        folder, fingerprint = Path(named["folder"]), named["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run_folder} does not say which prepared corpus it read ({RECORDS} is absent)") from None
    manifest = Manifest.load(folder)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{folder} now holds another corpus ({manifest.fingerprint}; the run read {fingerprint})")
    return folder


def manifest_of(run_folder: Path) -> Manifest | None:
    """What the run's prepared corpus holds; None where `records_folder` would raise."""
    try:
        return Manifest.load(records_folder(run_folder))
    except UserError:
        return None
