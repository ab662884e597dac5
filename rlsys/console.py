"""What a person sees while a run goes on: a bar for every long wait, a line for every result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


@dataclass(slots=True, kw_only=True, eq=False)
class Activity:
    """Something long that goes on."""

    what: str
    done: int = 0
    total: int | None = None
    """None where nobody can tell."""
    is_stage: bool = False
    """Whether it is a stage, counted in its steps."""
    since: float = field(default_factory=time.monotonic)


class Console:
    """A terminal with live bars; where there is none (a job's log), plain lines."""

    def __init__(self) -> None:
        self.rich = RichConsole(highlight=False)
        self.activities: list[Activity] = []
        """What goes on, each one inside of those before it."""

    def say(self, text: str) -> None:
        """One line that stays."""
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner with the seconds so far, for a wait of unknown length."""
        with self._going_on(Activity(what=what)):
            if not self.rich.is_terminal:
                self.say(f"{what} ...")
                yield
                return
            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            with Progress(*columns, console=self.rich) as bar:
                bar.add_task(what, total=None)
                yield

    @contextmanager
    def counting(self, what: str, *, total: int) -> Iterator[Callable[[], None]]:
        """A bar over `total` things; call the result once for each."""
        if not self.rich.is_terminal:
            self.say(f"{what} ...")
        with self._going_on(Activity(what=what, total=total)) as activity, self._bar(transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def tick() -> None:
                activity.done += 1
                bar.advance(task)

            yield tick

    @contextmanager
    def steps(self, name: str, *, total: int, done: int) -> Iterator[Steps]:
        """A bar over the steps of a stage."""
        activity = Activity(what=name, done=done, total=total, is_stage=True)
        with self._going_on(activity), self._bar(transient=False) as bar:
            yield Steps(self, bar, activity)

    @contextmanager
    def _going_on(self, activity: Activity) -> Iterator[Activity]:
        self.activities.append(activity)
        try:
            yield activity
        finally:
            self.activities.remove(activity)

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

    def __init__(self, console: Console, bar: Progress, activity: Activity) -> None:
        self._console, self._bar, self._activity = console, bar, activity
        self._task = bar.add_task(activity.what, total=activity.total, completed=activity.done, note="")

    def advance(self, step: int, **numbers: float) -> None:
        """Show the step that was just done, with a few numbers."""
        note = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
        self._bar.update(self._task, completed=step, note=note)
        self._activity.done, total = step, self._activity.total
        if step % 10 == 0 or step == total or step == 1:
            self._console.say(f"{self._activity.what} {step}/{total}  {note}")


def _short(value: float) -> str:
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.3g}"
