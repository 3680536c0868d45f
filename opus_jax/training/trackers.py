"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

Only metric names, numbers, the project and the run folder's name leave this machine: no configuration, no
environment, no paths.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from opus_jax.config import TrackingConfig
from opus_jax.errors import MissingExtraError


@runtime_checkable
class Tracker(Protocol):
    """Takes flat metrics of a step."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def open_trackers(run_dir: Path, tracking: TrackingConfig, resume_step: int) -> list[Tracker]:
    """The trackers that are switched on.

    Raises:
      MissingExtraError: one was asked for whose package is not installed.
    """
    for name in ("wandb", "trackio"):
        if getattr(tracking, name) and importlib.util.find_spec(name) is None:
            raise MissingExtraError(f"tracking.{name}", name, name)
    trackers: list[Tracker] = []
    if tracking.tensorboard:
        trackers.append(TensorBoard(run_dir / "tensorboard", resume_step))
    if tracking.wandb:
        trackers.append(Wandb(run_dir, tracking.wandb))
    if tracking.trackio:
        trackers.append(Trackio(run_dir, tracking.trackio, resume_step))
    return trackers


class TensorBoard:
    """Event files; on resume TensorBoard is told to forget everything after the restored step."""

    def __init__(self, folder: Path, resume_step: int):
        # the import costs half a second, which only runs with TensorBoard on should pay
        from tensorboardX import SummaryWriter

        # file names hold whole seconds only: without the step, a quick restart would overwrite the file before it
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1, filename_suffix=f".{resume_step}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One W&B run per run folder. Steps sent before a restart are ignored there; they are the same numbers."""

    def __init__(self, run_dir: Path, project: str):
        import wandb

        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=_stable_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            save_code=False,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def flush(self) -> None:
        return

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """One Trackio run per run folder. Trackio cannot forget steps, so what it was sent before is not sent again."""

    def __init__(self, run_dir: Path, project: str, resume_step: int):
        import trackio

        self._run: Any = trackio.init(project=project, name=f"{run_dir.name}-{_stable_id(run_dir)}", resume="allow")
        self._mark = run_dir / "trackio_step"
        self._sent = int(self._mark.read_text()) if resume_step and self._mark.is_file() else 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self._sent:
            self._run.log(metrics, step=step)
            self._sent = step

    def flush(self) -> None:
        self._mark.write_text(str(self._sent))

    def close(self) -> None:
        self.flush()
        self._run.finish()


def _stable_id(run_dir: Path) -> str:
    return hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:8]
