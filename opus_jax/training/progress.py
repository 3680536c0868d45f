"""The progress bar of a run: a live bar on a terminal, a line now and then elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows loss, bits per byte, tokens/s, the most selected domains, scoring overhead and data wait."""

    def __init__(self, steps: int, done: int = 0, *, enabled: bool = True):
        self.console = Console(stderr=True, quiet=not enabled)
        self._live = self.console.is_terminal
        self._bar = Bar(
            TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}"), console=self.console, disable=not (enabled and self._live),
        )  # fmt: skip
        self._steps, self._task = steps, self._bar.add_task("", total=steps, completed=done)
        self._target: float | None = None
        self._printed = 0.0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, step: int, line: dict[str, Any]) -> None:
        text = self._describe(line)
        self._bar.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if not self._live and (now - self._printed > SECONDS_BETWEEN_LINES or step == self._steps):
            self._printed = now
            self._print(f"step {step}/{self._steps}  {text}")

    def evaluated(self, step: int, bits: dict[str, float], target: float) -> None:
        self._target = target
        listed = ", ".join(f"{domain} {value:.3f}" for domain, value in bits.items())
        self._print(f"step {step}: target {target:.3f} bits per byte ({listed})")

    def say(self, message: str) -> None:
        self._print(message)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", markup=False, highlight=False, style="yellow")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _describe(self, line: dict[str, Any]) -> str:
        bits = "" if self._target is None else f"  bpb {self._target:.3f}"
        shares = sorted(line["selected_share"].items(), key=lambda item: -item[1])[:3]
        chosen = " ".join(f"{domain} {share:.0%}" for domain, share in shares if share > 0)
        return (
            f"loss {line['loss']:.3f}{bits}  {line['tokens_per_second']:,.0f} tok/s  [{chosen}]  "
            f"overhead {line['scoring_overhead']:.0%}  wait {line['data_wait_seconds'] * 1e3:.0f} ms"
        )
