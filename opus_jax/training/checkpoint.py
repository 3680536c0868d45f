"""Checkpoints of a run: saved beside the training, verified when read, and never half there.

A step is {state: a pytree of arrays, data: the plan of the candidate stream, meta: JSON}. Orbax writes it to a
temporary folder and renames that when everything is on disk; afterwards process 0 writes the hashes of its files
(`integrity.py`). Every process calls `save` and `restore`, from its main thread.
"""

import logging
import math
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from opus_jax.distributed.lost import lost_process
from opus_jax.errors import LostProcessError, UserError
from opus_jax.training import checkpoint_format, integrity

Say = Callable[[str], None]
Restored = tuple[int, Any, dict[str, np.ndarray], dict[str, Any]]

_DAMAGED = "damaged-"


class Checkpoints:
    """The checkpoints below one folder; a context manager that waits for the last save when it is left.

    Args:
      directory: usually `<run folder>/checkpoints`; made when absent.
      keep: how many of the newest lasting ones stay.
      best: whether the one with the lowest metric stays too.
      lasting: of a step, whether its checkpoint lasts; any other is there until the next one is. The default: all do.
      host_bytes: how much of the state is copied off the devices at a time, and one array at least; saving then waits
        until all is written. None = the whole state at once, written while the training goes on.
      say: takes each warning, one line; the default prints to standard error.
      committed: called by process 0, in the background, when a save is whole; what it raises, the save raises.
    """

    def __init__(
        self, directory: str | Path, keep: int, best: bool, *,
        lasting: Callable[[int], bool] = lambda step: True, host_bytes: int | None = None, say: Say | None = None,
        committed: Callable[[], None] | None = None,
    ):  # fmt: skip
        self.directory = Path(directory).absolute()
        self._keeping = checkpoint_format.Keeping(keep, best, lasting)
        self._host_bytes = host_bytes
        self._committed = committed
        self._say = (say or _print) if jax.process_index() == 0 else _silent
        self._checkpointer: Any | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        checkpoint_format.quiet_orbax()
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            _clean(self.directory)
        _barrier("checkpoints opened")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, LostProcessError):
            return  # a save on its way would wait for the process that has gone
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            # the error already on its way is the one to report; this one must not replace it
            self._say(str(failure))

    def steps(self) -> list[int]:
        """Committed steps, ascending, good or not."""
        return committed_steps(self.directory)

    def save(
        self, step: int, state: Any, data: dict[str, np.ndarray], meta: dict[str, Any], metric: float | None = None
    ) -> None:
        """Start saving; returns when the arrays are copied off the devices (and an earlier save has ended).

        With a limit on the host's memory, returns when everything is on disk.

        Args:
          state: pytree of arrays. The caller may donate its buffers to the next step at once.
          data: arrays of any shape, empty ones too.
          meta: what `json.dumps` takes.
          metric: lower is better, for `best`; null or non-finite = never the best.

        Raises:
          UserError: this save could not start, or an earlier one failed (a full disk, for instance).
        """
        self.wait()
        metrics = {"metric": float(metric)} if metric is not None and math.isfinite(metric) else None
        try:
            response = self._open().save_checkpointables_async(
                step, checkpoint_format.pack(state, data, meta), force=True, metrics=metrics
            )
        except Exception as error:
            raise self._failure(step, error) from error
        assert response is not None, "force=True saves whatever the policy says"
        self._saving = step, self._thread.submit(self._finish, step, response)
        if self._host_bytes is not None:
            self.wait()

    def check(self) -> None:
        """Raise UserError if the save in the background has failed by now; never waits."""
        if self._saving and self._saving[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is committed and hashed.

        Raises:
          UserError: it failed; the message names the step, the cause and the last good step.
        """
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Wait for the last save and release threads and files.

        Raises:
          UserError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            checkpointer, self._checkpointer = self._checkpointer, None
            if checkpointer is not None:
                _close(checkpointer)

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is intact, or None when there has never been one.

        A damaged checkpoint is said, passed over, and, once an older one is read, renamed to `damaged-<step>` so
        that its step can be saved again.

        Args:
          abstract_state: pytree of ShapeDtypeStruct with the shardings wanted now; the mesh may differ from the
            one that saved.

        Returns:
          (step, state, data, meta).

        Raises:
          UserError: there are checkpoints and none is readable, or an intact one does not fit `abstract_state`.
        """
        self.wait()
        damaged: list[int] = []
        for step in reversed(self.steps()):
            restored = _read_verified(self.directory, step, checkpoint_format.state_reader(abstract_state), self._say)
            if restored is not None:
                self._set_aside(damaged)
                return step, *restored
            damaged.append(step)
        _refuse_restart(self.directory, damaged)
        return None

    def _open(self) -> Any:
        """Opened at the first save, when `restore` has set damaged steps aside: they must not count as kept."""
        if self._checkpointer is None:
            self._checkpointer = checkpoint_format.open_checkpointer(self.directory, self._keeping, self._host_bytes)
        return self._checkpointer

    def _finish(self, step: int, response: Any) -> None:
        response.result()
        if jax.process_index() == 0:
            integrity.write_hashes(self.directory, step)
            integrity.remove_orphans(self.directory)
            if self._committed is not None:
                self._committed()

    def _failure(self, step: int, error: Exception) -> UserError | LostProcessError:
        if jax.process_count() > 1 and _is_of_runtime(error):
            return lost_process(error)  # a save ends with a barrier of all processes
        good = [s for s in self.steps() if s != step]
        last = f"the last good checkpoint is step {good[-1]}" if good else "there is no earlier checkpoint"
        return UserError(f"saving step {step} to {self.directory} failed: {_cause(error)}; {last}")

    def _set_aside(self, damaged: list[int]) -> None:
        if jax.process_index() == 0:
            for step in damaged:
                target = self.directory / f"{_DAMAGED}{step}"
                shutil.rmtree(target, ignore_errors=True)
                (self.directory / str(step)).rename(target)
                self._say(f"checkpoint {step} is kept as {target.name}; delete it when you do not need it")
            integrity.remove_orphans(self.directory)
        _barrier("damaged checkpoints set aside")
        if self._checkpointer is not None:
            self._checkpointer.reload()


def committed_steps(directory: str | Path) -> list[int]:
    """Steps with a committed folder below `directory`, ascending; temporary folders never count."""
    folder = Path(directory)
    return sorted(int(f.name) for f in folder.glob("*") if f.is_dir() and f.name.isdigit())


def load_params(run_dir: str | Path, *, say: Say | None = None) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """The parameters of a run's newest intact checkpoint, without its optimizer state.

    Returns:
      (params, step, meta): params as a nested dict of NumPy arrays, whatever mesh saved them.

    Raises:
      UserError: the run has no checkpoint, or none is readable.
    """
    step, (params, meta) = _newest(run_dir, checkpoint_format.read_params, say)
    return params, step, meta


def load_state(run_dir: str | Path, abstract_state: Any, *, say: Say | None = None) -> Restored:
    """The state of a run's newest intact checkpoint, read only: the run may still be training.

    Args and returns: as `Checkpoints.restore`, but nothing is removed, set aside or renamed.

    Raises:
      UserError: the run has no checkpoint, none is readable, or an intact one does not fit `abstract_state`.
    """
    step, found = _newest(run_dir, checkpoint_format.state_reader(abstract_state), say)
    return step, *found


def require_checkpoint(run_dir: str | Path) -> None:
    """Raise UserError where there is nothing to load, before time is spent on what goes with it."""
    directory = Path(run_dir).absolute() / "checkpoints"
    if not committed_steps(directory):
        _refuse_restart(directory, [])
        raise _absent(directory)


def _newest(run_dir: str | Path, read: Callable[[Path], Any], say: Say | None) -> tuple[int, Any]:
    directory = Path(run_dir).absolute() / "checkpoints"
    checkpoint_format.quiet_orbax()
    steps = committed_steps(directory)
    for step in reversed(steps):
        found = _read_verified(directory, step, read, say or _print)
        if found is not None:
            return step, found
    _refuse_restart(directory, steps)
    raise _absent(directory)


def _absent(directory: Path) -> UserError:
    return UserError(f"no checkpoint in {directory}: train the run first, or name another run folder")


# ---------------------------------------------------------------------------------------------- reading


def _read_verified(directory: Path, step: int, read: Callable[[Path], Any], say: Say) -> Any | None:
    """What `read` returns, or None (said) when the step is damaged. All processes come to the same answer."""
    found = integrity.problems(directory, step) if jax.process_index() == 0 else []
    if not _all_agree(not found):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        say(f"checkpoint {step} is damaged ({''.join(found[:1])}{more}): trying an older one")
        return None
    hashed = _all_agree(jax.process_index() != 0 or integrity.has_hashes(directory, step))
    if not hashed:
        say(f"checkpoint {step} has no hashes (its process died before they were written): it is used if it loads")
    result, failure = None, None
    try:
        result = read(directory / str(step))
    except Exception as error:  # the array store has many error classes
        failure = error
    if _all_agree(failure is None):
        return result
    cause = _cause(failure) if failure else "another process could not read it"
    if hashed:
        # every byte is as written, so walking back would hide a changed model or a full memory
        raise UserError(f"checkpoint {step} in {directory} is intact but cannot be loaded here: {cause}") from failure
    say(f"checkpoint {step} cannot be read ({cause}): trying an older one")
    return None


def _refuse_restart(directory: Path, damaged: list[int]) -> None:
    """Beginning again from step 0 is the user's decision, wherever a checkpoint has once been."""
    gone = [] if damaged else integrity.hashed_steps(directory)
    aside = sorted(folder.name for folder in directory.glob(_DAMAGED + "*"))
    if not (damaged or gone or aside):
        return
    what = f"steps {damaged} are unreadable" if damaged else f"there were steps {gone}" if gone else ", ".join(aside)
    raise UserError(
        f"no readable checkpoint in {directory} ({what}): restore the folder from a copy, or delete it to start again"
    )


def _clean(directory: Path) -> None:
    """Remove what a killed process left: unfinished saves, and lists of hashes without a step."""
    for folder in directory.glob(f"*{checkpoint_format.TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)
    if committed_steps(directory):
        integrity.remove_orphans(directory)


def _close(checkpointer: Any) -> None:
    try:
        checkpointer.close()
    except Exception as error:  # `wait` has raised it already: it raises once in each thread
        logging.getLogger(__name__).debug("closing after a failed save: %s", error)


# ----------------------------------------------------------------------------------- processes and messages


def _all_agree(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _is_of_runtime(error: BaseException | None) -> bool:
    """Whether JAX's runtime raised it, or what it was raised from."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _print(line: str) -> None:
    Console(file=sys.stderr).print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _silent(line: str) -> None:
    return
