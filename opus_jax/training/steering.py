"""What happens at the boundaries of plans: scores in, the next plan out.

Steps are divided into windows of equal length. The plan of window w + 1 comes from the scores of windows up to w - 1,
which are complete soon after window w has begun: the host never waits for the devices, and rows can be read ahead.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Num

from opus_jax.data.buffers import Buffers
from opus_jax.data.plan import Plan, advance
from opus_jax.selection.feedback import Proposal
from opus_jax.training.atomic import remove_partial_files, write_atomic
from opus_jax.training.strict_json import encode

FOLDER = "decisions"
Describe = Callable[["Controller", Proposal, Plan], dict[str, Any]]


@runtime_checkable
class Controller(Protocol):
    """Turns scores into proposals; immutable: every method gives the state that follows. See `selection/feedback`."""

    def observe(
        self,
        scores: Num[np.ndarray, " N"],
        domain_ids: Int[np.ndarray, " N"],
        document_ids: Int[np.ndarray, "N S"] | None = None,
    ) -> "Controller": ...

    def close(self) -> "Controller": ...

    def propose(self, slots: int) -> tuple["Controller", Proposal]: ...

    def to_arrays(self) -> dict[str, np.ndarray]: ...

    def restored(self, arrays: dict[str, np.ndarray]) -> "Controller": ...


class Steering:
    """The plans of a run: the one in force, and the next as soon as it is decided.

    Steps count from 0 here: `record(t)` is told what update t + 1 brought.

    Args:
      plan: the first plan.
      buffers: how many rows each step takes.
      steps: of the whole run.
      controller: what decides; None = the first plan holds for ever.
      window_steps: steps of a window.
      row_documents: documents of every row, needed where the controller gives priorities.
    """

    def __init__(
        self,
        plan: Plan,
        buffers: Buffers,
        steps: int,
        controller: Controller | None = None,
        window_steps: int = 1,
        row_documents: Int[np.ndarray, "R S"] | None = None,
    ):
        self.controller, self.buffers = controller, buffers
        self._steps, self._window, self._row_documents = steps, window_steps, row_documents
        self._plans: list[tuple[int, Plan]] = [(0, plan)]
        self._scored = False
        self._record: Callable[[int, Proposal, Plan], None] | None = None

    def write_decisions(self, folder: Path, step: int, describe: Describe) -> None:
        """From now on write decisions/*.json; those of a later time than `step` updates are removed."""
        folder = folder / FOLDER
        remove_partial_files(folder)
        for file in folder.glob("*-*.json"):
            if int(file.stem.rsplit("-", 1)[1]) > self._decided_for(step):
                file.unlink()

        def record(first: int, proposal: Proposal, plan: Plan) -> None:
            assert self.controller is not None
            folder.mkdir(parents=True, exist_ok=True)
            facts = describe(self.controller, proposal, plan)
            line = {"kind": facts.pop("kind"), "step": first, "utilities_until": first - self._window} | facts
            write_atomic(folder / f"{line['kind']}-{first:09d}.json", encode(line))

        self._record = record

    def plan_at(self, step: int) -> tuple[Plan, int | None]:
        """The plan in force at a step, and the step at which another may follow, None = never."""
        plan = next(plan for first, plan in reversed(self._plans) if first <= step)
        return plan, None if self.controller is None else (step // self._window + 1) * self._window

    def record(
        self,
        step: int,
        scores: Float[np.ndarray, " N"] | None,
        host: Mapping[str, np.ndarray],
        rows: Int[np.ndarray, " n"] | slice = slice(None),
    ) -> None:
        """Take in what a step scored, None = nothing, and decide a plan where its window ends.

        Args:
          host: the candidate rows. rows: which of them the scores belong to.
        """
        if self.controller is None:
            return
        if scores is not None:
            self.controller = self.controller.observe(scores, host["domain_id"][rows], host["document_ids"][rows])
            self._scored = True
        if (step + 1) % self._window == 0:
            self.controller = self.controller.close()
            self._decide(step + 1 + self._window)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plans and controller as arrays for a checkpoint: `restore` takes them back."""
        arrays = {"plan_starts": np.array([first for first, _ in self._plans]), "scored": np.asarray(self._scored)}
        for i, (_, plan) in enumerate(self._plans):
            arrays |= {f"plan{i}.{name}": value for name, value in plan.to_arrays().items()}
        if self.controller is not None:
            arrays |= {f"controller.{name}": value for name, value in self.controller.to_arrays().items()}
        return arrays

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        starts = np.asarray(arrays["plan_starts"]).tolist()
        plans = [Plan.from_arrays(_below(arrays, f"plan{i}.")) for i in range(len(starts))]
        self._plans, self._scored = list(zip(starts, plans, strict=True)), bool(arrays["scored"])
        if self.controller is not None:
            self.controller = self.controller.restored(_below(arrays, "controller."))

    def _decide(self, first: int) -> None:
        """Make the plan that holds from step `first` on."""
        assert self.controller is not None
        if not self._scored or first >= self._steps:
            return
        before = self._plans[-1][1]
        slot, end = (self.buffers.slots_before(step) for step in (first, min(first + self._window, self._steps)))
        self.controller, proposal = self.controller.propose(end - slot)
        plan = advance(before, slot, proposal.weights, proposal.priorities, self._row_documents)
        self._plans = [*self._plans[-1:], (first, plan)]
        if self._record is not None:
            self._record(first, proposal, plan)

    def _decided_for(self, step: int) -> int:
        """The last step that a plan decided within the first `step` updates can begin at."""
        return (step // self._window + 1) * self._window


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
