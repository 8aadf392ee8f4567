"""Say what happens: a rich progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 5.0


class Tracker:
    """Progress of one piece of work: how much is done, how fast, how long still."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._first_done = 0
        self._started_s = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` more units as done."""
        self.update(self.done + amount)

    def update(self, done: int, note: str = "") -> None:
        """Set how many units are done, with a short note such as the loss."""
        self.done = min(done, self.total)
        self.note = note or self.note

    def begin_at(self, done: int) -> None:
        """Count units finished in an earlier run as done, but not in the rate."""
        self.done = self._first_done = done
        self._started_s = time.monotonic()

    def line(self) -> str:
        """Describe the progress in one line."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        rate = (self.done - self._first_done) / elapsed_s
        left = f"{format_seconds((self.total - self.done) / rate)} left" if rate > 0 else ""
        parts = [
            f"{self.done:,}/{self.total:,} {self.unit}",
            f"{rate:,.3g} {self.unit}/s" if rate < 1000 else f"{rate:,.0f} {self.unit}/s",
            left,
            self.note,
        ]
        return f"  {self.what}: " + "  ".join(part for part in parts if part)


class Reporter:
    """Prints the story of a run to one console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str, style: str = "") -> None:
        """Print one line."""
        self.console.print(Text(text, style=style))

    @contextmanager
    def track(self, what: str, total: int, unit: str) -> Iterator[Tracker]:
        """Show progress while the block runs."""
        tracker = _PlainTracker(self, what, total, unit)
        if not self.console.is_terminal:
            yield tracker
            tracker.finish()
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=False) as bars:
            yield _BarTracker(bars, what, total, unit)


class _PlainTracker(Tracker):
    def __init__(self, reporter: Reporter, what: str, total: int, unit: str) -> None:
        super().__init__(what, total, unit)
        self._reporter = reporter
        self._last_line_s = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        super().update(done, note)
        if time.monotonic() - self._last_line_s >= _SECONDS_BETWEEN_LINES:
            self._last_line_s = time.monotonic()
            self._reporter.say(self.line())

    def finish(self) -> None:
        self._reporter.say(self.line())


class _BarTracker(Tracker):
    def __init__(self, bars: Progress, what: str, total: int, unit: str) -> None:
        super().__init__(what, total, unit)
        self._bars = bars
        self._task = bars.add_task(what, total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        super().update(done, note)
        self._bars.update(self._task, completed=self.done, note=self.note)

    def begin_at(self, done: int) -> None:
        super().begin_at(done)
        self._bars.update(self._task, completed=done)


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.3g} {self._unit}/s")


def format_seconds(seconds: float) -> str:
    """Write a duration as ``12.3 s``, ``4 min 5 s`` or ``2 h 7 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"
