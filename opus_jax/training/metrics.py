"""metrics.jsonl: one strict JSON object per logged step, and the same numbers to the trackers that are on."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from opus_jax.config import TrackingConfig
from opus_jax.training.atomic import remove_partial_files, write_atomic
from opus_jax.training.strict_json import encode, flatten
from opus_jax.training.trackers import open_trackers

NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends lines, each on disk for a reader as soon as it is written. For process 0 only.

    Args:
      run_dir: the run folder.
      tracking: which trackers are on.
      resume_step: the restored step, 0 for a fresh run; later lines are removed.

    Raises:
      MissingExtraError: a tracker's package is not installed.
    """

    def __init__(self, run_dir: str | Path, tracking: TrackingConfig, resume_step: int = 0):
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._trackers = open_trackers(folder, tracking, resume_step)
        truncate(folder, resume_step)
        self._file = (folder / NAME).open("a", buffering=1, encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """Write one line.

        Args:
          metrics: has `step`; the rest are numbers, text, null, or mappings of these by domain. A NaN or infinity
            becomes null and is named under `nonfinite`. Trackers get the numbers, a mapping as `name/domain`.
        """
        self._file.write(encode(metrics) + "\n")
        flat = flatten({name: value for name, value in metrics.items() if name != "step"})
        for tracker in self._trackers:
            tracker.log(int(metrics["step"]), flat)

    def flush(self) -> None:
        """Hand everything to the operating system: before a checkpoint, so that no line below it can be lost."""
        self._file.flush()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def truncate(run_dir: str | Path, step: int) -> None:
    """Remove lines of later steps and a torn last line, atomically."""
    remove_partial_files(run_dir)
    file = Path(run_dir) / NAME
    if not file.is_file():
        return
    before = file.read_bytes()
    after = b"".join(line for line in before.splitlines(keepends=True) if _is_kept(line, step))
    if after != before:
        write_atomic(file, after)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
