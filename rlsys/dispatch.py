"""Who rolls out what: every group goes to the least loaded worker that has room, and where none has, waits its turn."""

from __future__ import annotations

import asyncio
from collections import deque

from rlsys.workers import Roster, Worker


class Dispatch:
    """A queue before the workers of a roster, first come first served."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._waiting: deque[tuple[int, asyncio.Future[Worker]]] = deque()

    @property
    def num_waiting(self) -> int:
        """Rollouts that no worker has room for."""
        return sum(size for size, place in self._waiting if not place.done())

    async def room(self, size: int) -> Worker:
        """A worker that now has `size` rollouts more in flight; give them back to `end`."""
        if not self._waiting and (worker := self._roster.take(size)) is not None:
            return worker
        place: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, place))
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.end(place.result(), size)
            raise

    def end(self, worker: Worker, size: int) -> None:
        """`size` rollouts of this worker have ended, one way or another."""
        self._roster.give_back(worker, size)
        self.hand_out()

    def hand_out(self) -> None:
        """Let those go to work for whom there is room now, the first one first."""
        while self._waiting:
            size, place = self._waiting[0]
            if not place.done():
                worker = self._roster.take(size)
                if worker is None:
                    return
                place.set_result(worker)
            self._waiting.popleft()

    def fail(self, error: Exception) -> None:
        """Let all who wait fail with this error."""
        while self._waiting:
            _, place = self._waiting.popleft()
            if not place.done():
                place.set_exception(error)
