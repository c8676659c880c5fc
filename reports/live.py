"""A training run on a terminal while it goes: a bar, the latest numbers and their curves; elsewhere plain lines."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table

from reports.strict_json import JSON
from reports.terminal import print_line, shown
from reports.text import duration, number, sparkline
from reports.training import CURVES

# What a plain line says of a step, by the short names that fit it.
_SHORT = {
    "lm_loss": "LM", "kl_loss": "KL", "captured": "captured", "recall": "recall", "left_out": "left out",
    "tokens_per_second": "tokens/s", "rss_mib": "MiB",
}  # fmt: skip
# Plain lines of a whole run, about.
_LINES = 20


class LiveTraining:
    """Shows steps as they come: `with LiveTraining(console, "dense", 400) as shown: shown.step(values)`.

    `values` are those of an event "step"; see `reports.training`.
    """

    def __init__(self, console: Console, stage: str, total: int) -> None:
        self.console, self.stage, self.total = console, stage, total
        self._values: dict[str, list[float]] = {}
        self._line_every = max(1, total // _LINES)
        self._live: Live | None = None
        if console.is_interactive:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False), progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(stage, total=total)
            self._live = Live(console=console, transient=True, refresh_per_second=4, get_renderable=self._picture)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, step: int) -> None:
        """`step` steps were done before."""
        if self._live is not None:
            self._bar.update(self._task, completed=step)

    def step(self, values: Mapping[str, JSON]) -> None:
        """Show a step that is done."""
        for key in CURVES:
            if isinstance(values.get(key), (int, float)):
                self._values.setdefault(key, []).append(float(values[key]))
        done = values["step"] + 1
        if self._live is not None:
            self._bar.update(self._task, completed=done)
        elif done == 1 or done % self._line_every == 0 or done == self.total or "captured" in values:
            numbers = [
                f"{name} {number(float(values[key]))}" for key, name in _SHORT.items() if values.get(key) is not None
            ]
            seconds = duration(float(values.get("seconds", 0.0)))
            print_line(self.console, "  ".join([f"step {done}/{self.total}", *numbers, seconds]))

    def note(self, text: str) -> None:
        """Say something beside the numbers."""
        print_line(self.console, text)

    def _picture(self) -> Group:
        table = Table(Column(), Column(justify="right"), Column(), box=None, show_header=False, padding=(0, 2, 0, 0))
        for key, label in CURVES.items():
            if values := self._values.get(key):
                table.add_row(
                    *(shown(self.console, cell) for cell in (label, number(values[-1]), sparkline(values, 32)))
                )
        return Group(self._bar, table)
