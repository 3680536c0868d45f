"""`--profile steps=A:B`: a trace of some steps of a run, for XProf, TensorBoard's profiler or Perfetto.

Steps are counted as in metrics.jsonl, from 1; `steps=10:13` is steps 10, 11 and 12. Tracing begins when every earlier
step has finished on the devices and ends when the last of these has, so nothing else is in it.
"""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import jax

from opus_jax.errors import UserError

FOLDER = "profile"
NO_STEPS = range(0)
_STEPS = re.compile(r"steps=(\d+):(\d+)")


def profiled_steps(text: str | None) -> range:
    """The steps that `--profile` names; none where it is not given.

    Raises:
      UserError: the text is not `steps=A:B` with 1 <= A < B.
    """
    if text is None:
        return NO_STEPS
    match = _STEPS.fullmatch(text)
    steps = range(int(match[1]), int(match[2])) if match else NO_STEPS
    if not steps or steps.start < 1:
        raise UserError(
            f"--profile {text!r} must be steps=A:B with whole numbers 1 <= A < B, for example steps=10:13 "
            "for steps 10, 11 and 12"
        )
    return steps


class Profiler:
    """Traces into `<run folder>/profile`; a context manager that ends a trace that is still open.

    Args:
      run_dir: the run folder.
      steps: those to trace, from `profiled_steps`.
      last: the run's last step.

    Raises:
      UserError: the run ends before the first of them.
    """

    def __init__(self, run_dir: Path, steps: range, last: int):
        if steps and steps.start > last:
            raise UserError(
                f"--profile steps={steps.start}:{steps.stop}: the run has {last} steps (run.steps): name earlier ones"
            )
        self._folder, self._steps, self._last = run_dir / FOLDER, steps, last
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def starts(self, step: int) -> bool:
        """Whether tracing begins with this step, so that earlier ones must have finished."""
        return step in self._steps and not self._tracing

    def ends(self, step: int) -> bool:
        """Whether this step is the last to be traced, so that it must have finished before `stop_after`."""
        return self._tracing and (step + 1 not in self._steps or step == self._last)

    def step(self, step: int) -> AbstractContextManager:
        """Around the dispatch of a step: names it in the trace."""
        if self.starts(step):
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stop_after(self, step: int) -> None:
        """Write the trace if this was the last step of it."""
        if self.ends(step):
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
