"""Live progress: one line per stage, with a bar, speed and the latest figures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from rich.text import Text

from bilect.runtime.terminal import PlainConsole, printable

__all__ = ["Progress", "RichProgress", "SilentProgress", "Task"]


class Task(Protocol):
    """One running stage."""

    def advance(self, amount: float = 1, **figures: float | None) -> None:
        """Move on by ``amount``, showing the latest figures."""


class Progress(Protocol):
    """What stages report to."""

    def task(self, name: str, total: float | None = None, unit: str | None = None) -> Any:
        """Context manager of a ``Task`` of ``total`` units; with a ``unit``, the speed is shown."""

    def note(self, text: str) -> None:
        """One line for the reader."""


class _Silent:
    def advance(self, amount: float = 1, **figures: float | None) -> None:
        pass


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str | None = None) -> Iterator[Task]:
        """A task that shows nothing."""
        yield _Silent()

    def note(self, text: str) -> None:
        """Nothing."""


class _RichTask:
    def __init__(self, owner: "RichProgress", name: str, total: float | None, unit: str | None) -> None:
        self.owner, self.name, self.unit = owner, name, unit
        self.shown, self.done, self.start = "", 0.0, time.perf_counter()
        self.id = owner.bars.add_task(printable(name), total=total, figures="")

    def advance(self, amount: float = 1, **figures: float | None) -> None:
        self.done += amount
        self.shown = (
            "  ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in figures.items() if v is not None) or self.shown
        )
        self.owner.bars.update(self.id, advance=amount, figures=self.figures)

    @property
    def figures(self) -> str:
        if self.unit is None:
            return self.shown
        speed = self.done / max(time.perf_counter() - self.start, 1e-9)
        shown = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
        return f"{shown} {self.unit}/s  {self.shown}".rstrip()


class RichProgress:
    """A live display on a terminal; one line per finished stage elsewhere. Use as a context manager."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = PlainConsole()
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> "RichProgress":
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.bars.stop()

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str | None = None) -> Iterator[Task]:
        """A bar while the stage runs, a line when it is done."""
        start = time.perf_counter()
        task = _RichTask(self, name, total, unit)
        if not self.console.is_terminal:
            self.console.print(Text.assemble(("  ...", "dim"), f" {printable(name)}"))
        try:
            yield task
            seconds = time.perf_counter() - start
            line = f" {printable(name):<30} {seconds:7.1f} s   "
            self.console.print(Text.assemble(("  done", "green"), line, (task.figures, "dim")))
        finally:
            self.bars.remove_task(task.id)

    def note(self, text: str) -> None:
        """One line, above the bars."""
        self.console.print(text)
