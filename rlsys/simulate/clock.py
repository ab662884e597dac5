"""An asyncio event loop that never waits: where nothing is ready, its clock jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class StandstillError(Exception):
    """Every task waits and no timer is set, so that nothing will ever happen again; a bug in what is simulated."""


class _Selector(selectors.SelectSelector):
    """Looks whether a file is ready, and moves the clock where the loop would have slept."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise StandstillError(f"at {self.now:g} s every task waits, and no timer is set that would wake one")
        self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its `time()` is virtual, in seconds, and begins at 0. What waits for another thread is not for this loop."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-9  # timers that are due within it run together

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._virtual.now


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in virtual time; the same coroutine takes the same course every time.

    Raises:
        StandstillError: it waits for what will never happen.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
