"""A model of an engine with continuous batching, computed from event to event and not token by token.

One forward pass writes one token of every running generation and takes `a + b * n` seconds for n of them. So between
two events (one begins, ends, or the engine is paused) all running generations grow at the same rate, and one number,
the tokens that a generation would have if it ran since the beginning, says how far everybody is: who began at mark m
with L tokens to write ends when the number reaches m + L. An event costs O(log n).

Left out: that keys and values of long contexts take longer to read than those of short ones, that they may not fit into
memory, and that a prompt is read in pieces between decoded tokens (here nobody writes meanwhile; the sum is the same).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque

_NEAR = 1e-3
"""Tokens that a generation may lack when it ends: a timer may be due a rounding error early."""


class _Generation:
    """One completion that is waited for."""

    __slots__ = ("done", "first_version", "prompt", "running", "tokens")

    def __init__(self, done: asyncio.Future[tuple[int, int]], tokens: int, prompt: int) -> None:
        self.done, self.tokens, self.prompt = done, tokens, prompt
        self.running = False
        self.first_version = -1


class EngineModel:
    """At most `max_running` generations at once; the others wait in the order in which they came."""

    def __init__(self, *, seconds: float, seconds_per_rollout: float, prefill: float, max_running: int) -> None:
        self._a, self._b, self._prefill, self._max = seconds, seconds_per_rollout, prefill, max_running
        self._loop = asyncio.get_running_loop()
        self._began = self._updated = self._loop.time()
        self._mark = 0.0
        self._reading = 0.0  # seconds until the prompts of those that run are read
        self._running: list[tuple[float, int, _Generation]] = []  # a heap
        self._waiting: deque[_Generation] = deque()
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._setting = False
        self._paused = False
        self._ended: float | None = None
        self._version = 0
        self.num_running = 0
        self.tokens = 0.0
        """Written so far, by all generations."""
        self.busy_seconds = 0.0
        """Time with at least one generation running, pauses excluded."""
        self.rollout_seconds = 0.0
        """The integral of running generations over time."""

    @property
    def num_unfinished(self) -> int:
        """Generations that run or wait."""
        return self.num_running + sum(not one.done.done() for one in self._waiting)

    @property
    def age(self) -> float:
        """Seconds from when it was made until now, or until it stopped."""
        return (self._loop.time() if self._ended is None else self._ended) - self._began

    async def generate(self, tokens: int, *, prompt: int = 0) -> tuple[int, int]:
        """Write so many tokens behind `prompt` tokens that nobody has read yet.

        Returns the versions of the weights that wrote the first and the last of them.
        """
        generation = _Generation(self._loop.create_future(), tokens, prompt)
        self._advance()
        self._waiting.append(generation)
        self._admit()
        try:
            return await generation.done
        finally:
            if generation.running:  # the caller gave up
                self._advance()
                generation.running = False
                self.num_running -= 1
                self._admit()

    def pause(self) -> None:
        """Freeze everything."""
        self._advance()
        self._paused = True
        self._wake_later()

    def resume(self, version: int) -> None:
        """Go on; tokens from here on are of `version`."""
        self._advance()
        self._paused, self._version = self._ended is not None, version
        self._admit()

    def stop(self) -> None:
        """Write nothing any more, for ever: its process hangs or has ended."""
        self.pause()
        self._ended = self._loop.time() if self._ended is None else self._ended
        self._waiting.clear()

    def settle(self) -> None:
        """Bring the sums (`tokens`, `busy_seconds`, ...) up to now."""
        self._advance()

    def _seconds_per_token(self) -> float:
        return self._a + self._b * self.num_running

    def _advance(self) -> None:
        """Let time pass since the last event."""
        now = self._loop.time()
        passed, self._updated = now - self._updated, now
        if self._paused or not self.num_running:
            return
        self.busy_seconds += passed
        self.rollout_seconds += passed * self.num_running
        read = min(passed, self._reading)
        self._reading -= read
        written = (passed - read) / self._seconds_per_token()
        self._mark += written
        self.tokens += written * self.num_running

    def _admit(self) -> None:
        while self._waiting and self.num_running < self._max and not self._paused:
            generation = self._waiting.popleft()
            if generation.done.done():  # given up while it waited
                continue
            generation.running, generation.first_version = True, self._version
            heapq.heappush(self._running, (self._mark + generation.tokens, next(self._numbers), generation))
            self._reading += generation.prompt / self._prefill
            self.num_running += 1
        self._wake_later()

    def _wake_later(self) -> None:
        """Set the timer, once for all that happens at this moment."""
        if not self._setting:
            self._setting = True
            self._loop.call_soon(self._set_timer)

    def _set_timer(self) -> None:
        self._setting = False
        self._advance()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._running and not self._running[0][2].running:
            heapq.heappop(self._running)
        if self._running and not self._paused:
            lacking = max(0.0, self._running[0][0] - self._mark)
            seconds = self._reading + lacking * self._seconds_per_token()
            self._timer = self._loop.call_later(seconds, self._wake)

    def _wake(self) -> None:
        """End the generations that are complete."""
        self._timer = None
        self._advance()
        while self._running and (self._running[0][0] <= self._mark + _NEAR or not self._running[0][2].running):
            generation = heapq.heappop(self._running)[2]
            if not generation.running:
                continue
            generation.running = False
            self.num_running -= 1
            if not generation.done.done():
                generation.done.set_result((generation.first_version, self._version))
        self._admit()
