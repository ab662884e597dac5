"""What a person sees while a run goes on: a bar for every long wait, a line for every result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Console:
    """A terminal with live bars; where there is none (a job's log), plain lines."""

    def __init__(self) -> None:
        self.rich = RichConsole(highlight=False)

    def say(self, text: str) -> None:
        """One line that stays."""
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner with the seconds so far, for a wait of unknown length."""
        if not self.rich.is_terminal:
            self.say(f"{what} ...")
            yield
            return
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=self.rich) as bar:
            bar.add_task(what, total=None)
            yield

    @contextmanager
    def counting(self, what: str, *, total: int) -> Iterator[Callable[[], None]]:
        """A bar over `total` things; call the result once for each."""
        if not self.rich.is_terminal:
            self.say(f"{what} ...")
            yield lambda: None
            return
        with self._bar(transient=True) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda: bar.advance(task)

    @contextmanager
    def steps(self, name: str, *, total: int, done: int) -> Iterator[Steps]:
        """A bar over the steps of a stage."""
        with self._bar(transient=False) as bar:
            yield Steps(self, bar, name, total, done)

    def _bar(self, *, transient: bool) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.rich,
            transient=transient,
            disable=not self.rich.is_terminal,
        )

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        """A final table of names and values."""
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        self.rich.print(table)


class Steps:
    """The bar of one stage; every tenth step is a line of its own, so that a log tells the story too."""

    def __init__(self, console: Console, bar: Progress, name: str, total: int, done: int) -> None:
        self._console, self._bar, self._name, self._total = console, bar, name, total
        self._task = bar.add_task(name, total=total, completed=done, note="")

    def advance(self, step: int, **numbers: float) -> None:
        """Show the step that was just done, with a few numbers."""
        note = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        self._bar.update(self._task, completed=step, note=note)
        if step % 10 == 0 or step == self._total or step == 1:
            self._console.say(f"{self._name} {step}/{self._total}  {note}")


def _short(value: float) -> str:
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.3g}"
