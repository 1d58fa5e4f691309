"""What the person at the terminal sees while the lab runs."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """Told what happens. Seconds are estimates of the work ahead."""

    def work_left(self, done_s: float, left_s: float) -> None: ...

    def step(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...


class SilentReporter:
    """Says nothing; keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[str] = []

    def work_left(self, done_s: float, left_s: float) -> None:
        assert left_s >= 0

    def step(self, name: str) -> None:
        self.steps.append(name)

    def note(self, text: str) -> None:
        self.notes.append(text)


class RichReporter:
    """A progress bar with the time left, on standard error; plain lines where it is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("starting", total=1.0, left="")
        self._left = ""

    def __enter__(self) -> RichReporter:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def work_left(self, done_s: float, left_s: float) -> None:
        minutes, seconds = divmod(round(left_s), 60)
        self._left = f"about {minutes}:{seconds:02} left"
        self._progress.update(
            self._task, completed=done_s, total=max(done_s + left_s, 0.1), left=self._left
        )

    def step(self, name: str) -> None:
        self._progress.update(self._task, description=name)
        if not self._console.is_terminal:
            self._console.print(f"{name} ({self._left})", markup=False, highlight=False)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
