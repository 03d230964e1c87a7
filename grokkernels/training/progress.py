"""What a run shows while it goes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.text import Text


class Silent:
    """Shows nothing: for use from Python."""

    def say(self, text: str) -> None:
        """One line for the reader."""

    def update(self, progress: float, text: str) -> None:
        """The share of the run that is done, and the newest figures."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class OnConsole(Silent):
    """Shows a bar with the time left, on standard error, and lines above it; without a terminal, lines only."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            _TimeLeft(),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=1.0, text="", began=None)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def update(self, progress: float, text: str) -> None:
        task = self._bar.tasks[0]
        if task.fields["began"] is None:
            self._bar.update(self._task, began=(time.monotonic(), progress))
        self._bar.update(self._task, completed=progress, text=text)

    def __enter__(self) -> OnConsole:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class _TimeLeft(ProgressColumn):
    """Time left at the mean pace since this process began: evaluations and saving are in it."""

    def render(self, task: Task) -> Text:
        if task.fields["began"] is None:
            return Text("-:-- left")
        start, before = task.fields["began"]
        done = task.completed - before
        if done <= 0.0:
            return Text("-:-- left")
        return Text(f"{duration((time.monotonic() - start) * max(0.0, 1.0 - task.completed) / done)} left")


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
