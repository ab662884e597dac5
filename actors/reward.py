"""The reward actor: one reward in a process of its own, with the gradings of many rollouts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from rlsys.config import RewardConfig
from rlsys.errors import ActorError
from rlsys.interfaces import RewardResult
from rlsys.plugins import build, run_hook
from rlsys.reward_terms import RewardTerm
from rlsys.types import Problem, Rollout, RolloutGroup

_T = TypeVar("_T")


class RewardActor:
    """Hosts one reward. A plain class: Ray only places it, and makes it anew where its process died.

    A grading takes a place with `open` and gives it back when it has ended. A synchronous reward that hangs holds its
    thread for ever: then the actor takes nothing new, ends what it has, and says that it is worn out.
    """

    def __init__(self, *, plug_in: RewardConfig, place: str) -> None:
        assert plug_in.actors is not None
        self._max_gradings = plug_in.actors.max_sessions
        self._open_seconds = plug_in.actors.call_seconds
        self._place = place
        self._plug_in = plug_in
        self._term: RewardTerm | None = None  # until it has started
        self._starting = asyncio.Lock()
        self._draining = False
        self._expected: dict[str, asyncio.TimerHandle] = {}
        self._gradings: dict[str, asyncio.Task[Any]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Make and start the reward, which may take long; raises what it raises."""
        async with self._starting:
            if self._term is None:
                reward = build(self._plug_in.use, self._plug_in.options, place=self._place)
                await run_hook(reward, "start")
                self._term = RewardTerm.configured(self._plug_in, reward)

    async def isolation(self) -> dict[str, str]:
        """The reward's tier, where it has one."""
        return {} if self._term is None else self._term.isolation

    async def open(self, session_id: str, label: str) -> bool:  # noqa: ARG002  # tools want to know for whom
        """Take a place for one grading; False where there is none. One that is not used in time is free again.

        A new actor, in the place of one that died, has none before it was told to start.
        """
        full = await self.num_sessions() >= self._max_gradings
        if full or self._draining or self._term is None or self._term.threads.num_late:
            return False
        self._idle.clear()
        loop = asyncio.get_running_loop()
        self._expected[session_id] = loop.call_later(self._open_seconds, self._end, session_id)
        return True

    async def score(self, session_id: str, problem: Problem, rollout: Rollout) -> RewardResult:
        """Grade one rollout in this place, which is free again afterwards.

        Raises:
            ActorError: there is no such place, or it was taken away in the middle.
            RewardError: the reward failed.
        """
        return await self._graded(session_id, lambda term: term.grade(problem, rollout))

    async def score_group(self, session_id: str, group: RolloutGroup) -> list[RewardResult]:
        """Grade one group; otherwise like `score`."""
        return await self._graded(session_id, lambda term: term.grade_group(group))

    async def _graded(self, session_id: str, work: Callable[[RewardTerm], Coroutine[Any, Any, _T]]) -> _T:
        timer = self._expected.pop(session_id, None)
        if timer is None or self._term is None:
            raise ActorError(f"{self._place}: the place is unknown; its actor was replaced, or it was not used in time")
        timer.cancel()
        grading = self._gradings[session_id] = asyncio.create_task(work(self._term))
        try:
            await asyncio.wait({grading})
            if grading.cancelled():
                raise ActorError(f"{self._place}: the grading was given up; its actor is about to end")
            result: _T = grading.result()
            return result
        finally:
            grading.cancel()
            self._end(session_id)

    async def close(self, session_id: str) -> None:
        """Give up a grading, also one that has not begun; one that is unknown has ended already."""
        if (grading := self._gradings.get(session_id)) is not None:
            grading.cancel()
            await asyncio.wait({grading})
        self._end(session_id)

    def _end(self, session_id: str) -> None:
        if (timer := self._expected.pop(session_id, None)) is not None:
            timer.cancel()
        self._gradings.pop(session_id, None)
        if not self._expected and not self._gradings:
            self._idle.set()

    async def num_sessions(self) -> int:
        """How many gradings have a place."""
        return len(self._expected) + len(self._gradings)

    async def state(self) -> Literal["new", "well", "worn out"]:
        """Whether it is yet to be started, or has threads that hang and nothing else, and should be replaced."""
        if self._term is None:
            return "new"
        hangs = self._term.threads.num_late and not await self.num_sessions()
        return "worn out" if hangs else "well"

    async def drain(self, wait_seconds: float) -> int:
        """Take nothing new and wait for the last grading to end; returns how many are under way after all."""
        self._draining = True
        with contextlib.suppress(TimeoutError):  # the answer says how it ended
            await asyncio.wait_for(self._idle.wait(), wait_seconds)
        return await self.num_sessions()

    async def close_all(self) -> None:
        """Give up every grading, then end the reward."""
        self._draining = True
        await asyncio.gather(*(self.close(session_id) for session_id in [*self._expected, *self._gradings]))
        if self._term is not None:
            await run_hook(self._term.reward, "close")
