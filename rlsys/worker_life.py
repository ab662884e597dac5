"""One rollout worker from its first call to its last: started, made ready, looked at again and again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from rlsys.cluster import Actor
from rlsys.config import ActorsConfig
from rlsys.errors import ActorDiedError, ActorError, ActorTimeoutError, EngineDiedError, RlsysError
from rlsys.workers import Worker, WorkerState

LOST = (ActorDiedError, ActorTimeoutError, EngineDiedError)
"""What says that a worker, not its work, has failed."""
CLOSE_SECONDS = 10.0


class Bell:
    """Wakes everybody who waits for something to change."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Something has changed."""
        self._rung.set()
        self._rung = asyncio.Event()

    async def heard(self, seconds: float | None = None) -> None:
        """Return at the next ring, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # `wait_for` of Python 3.11 may swallow a cancellation
                await self._rung.wait()


class Surroundings(Protocol):
    """What a worker's life needs of its fleet."""

    settings: ActorsConfig
    bell: Bell
    frozen: bool

    async def make_ready(self, life: WorkerLife, backend: str) -> None:
        """Its engine answers: tell it what it must know and let it serve or wait for weights."""

    def let_go(self, name: str, why: str) -> None:
        """It is to leave: no new work, another one in its place."""

    def ended(self, life: WorkerLife) -> None:
        """It is no more: take it off the roster."""


class WorkerLife:
    """A worker, its actor, and the task that watches over both."""

    def __init__(self, worker: Worker, actor: Actor, fleet: Surroundings) -> None:
        self.worker, self.actor = worker, actor
        self.pulse: Mapping[str, float] = {}
        """Its last answer: `tokens` written so far, generations that are `running`, whether its node is `leaving`."""
        self.failure: RlsysError | None = None
        """Why it ended, where it did not leave as it was told to."""
        self.left = False
        """Whether it was let go."""
        self._fleet = fleet
        self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        """End it, politely."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def kill(self, why: RlsysError) -> None:
        """End it at once: its calls fail."""
        self.failure = self.failure or why
        self.actor.kill()
        self._task.cancel()

    async def _run(self) -> None:
        try:
            backend = await self.actor.call("start", seconds=self._fleet.settings.start_seconds)
            await self._fleet.make_ready(self, backend)
            await self._watch()
            self.left = True
        except RlsysError as error:
            self.failure = self.failure or error
        finally:
            self._fleet.ended(self)
            await self._close()

    async def _watch(self) -> None:
        """Look at it again and again; returns when it is to leave and has nothing left to do, or no time."""
        clock, settings = asyncio.get_running_loop().time, self._fleet.settings
        look_at, moved_at, leave_at, tokens = clock(), clock(), math.inf, -1.0
        while True:
            if self.worker.state is WorkerState.DRAINING:
                leave_at = min(leave_at, clock() + settings.drain_seconds)
                if not self.worker.in_flight or clock() >= leave_at:
                    return
            if clock() < look_at:
                await self._fleet.bell.heard(min(look_at, leave_at) - clock())
                continue
            self.pulse = await self.actor.call("pulse", seconds=settings.answer_seconds)
            look_at = clock() + settings.watch_seconds
            if self.pulse.get("leaving") and self.worker.state is not WorkerState.DRAINING:
                self._fleet.let_go(self.worker.name, "its node will be taken away")
                continue
            paused = self._fleet.frozen or self.worker.state is WorkerState.STALE
            if paused or not self.pulse["running"] or self.pulse["tokens"] != tokens:
                moved_at, tokens = clock(), self.pulse["tokens"]
            elif clock() - moved_at > settings.stall_seconds:
                raise ActorTimeoutError(
                    f"{self.actor.name} has work but has written no token for {clock() - moved_at:.0f} s "
                    "(actors.stall_seconds)"
                )

    async def _close(self) -> None:
        try:
            if self.failure is None:
                await self.actor.call("close", seconds=CLOSE_SECONDS)
        except ActorError as error:
            self.failure = error
        finally:
            self.actor.kill()


Place = Callable[[int], Actor]
"""Makes the worker with a number."""
