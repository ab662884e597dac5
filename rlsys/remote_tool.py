"""A tool in actors of its own, as a rollout sees it: sessions that outlive the actor in which they began."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlsys.cluster import Actor
from rlsys.config import PoolConfig
from rlsys.errors import ActorError, RlsysError, ToolError
from rlsys.interfaces import Tool, ToolResult
from rlsys.plugins import run_hook
from rlsys.pool import Roster

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A call that so many actors in a row did not survive is not tried on another one."""
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session lives."""

    actor: Actor
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class RemoteTool:
    """Looks and answers like the tool that it is made from, but its sessions live in the actors of a pool.

    Where all actors are full, callers stand in line, so that only the first one asks again and again. A rollout that
    holds a session of one full pool and waits for another's gives way at the deadline: it is dropped.
    """

    def __init__(self, tool: Tool, pool: PoolConfig) -> None:
        self._local = tool
        self.name = tool.name
        self.description = tool.description
        self.parameters = tool.parameters
        self.pool = pool
        self._roster = Roster()
        self._line = asyncio.Lock()
        self._news = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the local tool for a moment where it does not know before what it is, as one that asks a server."""
        if not self._local.description:
            await run_hook(self._local, "start")
            self.description, self.parameters = self._local.description, self._local.parameters
            await run_hook(self._local, "close")

    def use_actors(self, actors: Sequence[Actor]) -> None:
        """From now on, begin sessions in these; those that are open stay where they are."""
        self._roster.actors = tuple(actors)
        self._news.set()

    async def open(self, rollout_id: str) -> RemoteSession:
        """Begin a session in the actor that carries the fewest of this caller's.

        Raises:
            ToolError: no actor had room within the pool's `wait_seconds`, or the tool raised.
        """
        return RemoteSession(self, rollout_id, await self.find_place(rollout_id))

    async def find_place(self, rollout_id: str) -> Place:
        """Open a session in some actor; raises as `open` does."""
        deadline = time.monotonic() + self.pool.wait_seconds
        if not self._line.locked() and (place := await self._ask_all(rollout_id, deadline)) is not None:
            return place
        try:
            await asyncio.wait_for(self._line.acquire(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise self._no_place() from None
        try:
            pause = FIRST_PAUSE_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                self._news.clear()
                if (place := await self._ask_all(rollout_id, deadline)) is not None:
                    return place
                await self._wait_for_news(min(pause, left))
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            raise self._no_place()
        finally:
            self._line.release()

    def _no_place(self) -> ToolError:
        return ToolError(
            f"tool {self.name!r}: none of its {len(self._roster.actors)} actors took a session within "
            f"{self.pool.wait_seconds:g} s; give it more actors (count) or room in each (max_sessions)"
        )

    async def _wait_for_news(self, seconds: float) -> None:
        """Wait until a session of this caller has ended or the actors have changed, at most so long."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({news}, timeout=seconds)
        finally:
            news.cancel()

    async def _ask_all(self, rollout_id: str, deadline: float) -> Place | None:
        for actor in self._roster.best_first():
            left = max(FIRST_PAUSE_SECONDS, deadline - time.monotonic())
            if (place := await self._ask(actor, rollout_id, min(self.pool.call_seconds, left))) is not None:
                return place
        return None

    async def _ask(self, actor: Actor, rollout_id: str, seconds: float) -> Place | None:
        """Open a session in this actor; None where it is full or does not answer."""
        place = Place(actor)
        self._roster.load[actor.name] += 1
        try:
            if await actor.call("open", place.session_id, rollout_id, seconds=seconds):
                return place
        except ActorError as error:
            log.warning("%s; other actors are asked for a session", error)
            self.leave_behind(place)
            return None
        except BaseException:  # the tool raised or the rollout was cancelled
            self.leave_behind(place)
            raise
        self._roster.load[actor.name] -= 1
        return None

    async def leave(self, place: Place) -> None:
        """End a session; one whose actor died has ended with it. Raises what the tool raises."""
        try:
            await place.actor.call("close", place.session_id, seconds=self.pool.call_seconds)
        except ActorError as error:
            log.info("%s; the session ends with its actor", error)
        finally:
            self._roster.load[place.actor.name] -= 1
            self._news.set()

    def leave_behind(self, place: Place) -> None:
        """Give up an actor that failed, which may yet be alive and hold the session.

        It is told to end the session, and is not asked for another one before it has answered.
        """
        self._roster.unanswered[place.actor.name] += 1
        task = asyncio.ensure_future(self._leave_unwatched(place))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave_unwatched(self, place: Place) -> None:
        try:
            await self.leave(place)
        except RlsysError as error:
            log.warning("%s; its session had been given up before", error)
        finally:
            self._roster.unanswered[place.actor.name] -= 1


class RemoteSession:
    """One rollout's use of a remote tool, with a journal of what the policy has read.

    Where its actor dies, hangs or has forgotten the session, one is opened in another actor, the calls of the journal
    are made again there, and every answer is compared with the one that was read. Then the session is what the policy
    believes it to be, also where the policy itself had lost its state, as that is read in the answers. A call that was
    under way is made again only then, in the new session, so that what it did in the lost one does not count twice.
    """

    def __init__(self, tool: RemoteTool, rollout_id: str, place: Place) -> None:
        self._tool = tool
        self._rollout_id = rollout_id
        self._place: Place | None = place
        self._journal: list[tuple[Mapping[str, Any], ToolResult]] = []

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        """Make one call, wherever the session lives by then.

        Raises:
            ToolError: the tool raised, an answer made again differs, or no actor could answer.
        """
        for _ in range(MAX_ATTEMPTS):
            try:
                result = await self._ask(await self._current_place(), arguments)
            except ActorError as error:
                failure = error
                log.warning("%s; the session of rollout %s begins again in another actor", error, self._rollout_id)
                if self._place is not None:
                    self._tool.leave_behind(self._place)
                    self._place = None
            else:
                self._journal.append((arguments, result))
                return result
        raise ToolError(
            f"tool {self._tool.name!r}: {MAX_ATTEMPTS} actors in a row did not survive one call; the last: {failure}"
        )

    async def _current_place(self) -> Place:
        if self._place is None:
            place = await self._tool.find_place(self._rollout_id)
            try:
                await self._replay(place)
            except BaseException:
                self._tool.leave_behind(place)
                raise
            self._place = place
        return self._place

    async def _replay(self, place: Place) -> None:
        for arguments, known in self._journal:
            result = await self._ask(place, arguments)
            if (result.text, result.ok) != (known.text, known.ok):
                log.warning("made again, %r gave %r instead of %r", arguments, result, known)
                raise ToolError(
                    f"tool {self._tool.name!r} lost an actor, and a call made again in another one gave another answer "
                    "than the policy had read"
                )

    async def _ask(self, place: Place, arguments: Mapping[str, Any]) -> ToolResult:
        result: ToolResult = await place.actor.call(
            "call", place.session_id, arguments, seconds=self._tool.pool.call_seconds
        )
        return result

    async def close(self) -> None:
        """End the session. Raises what the tool raises."""
        place, self._place = self._place, None
        if place is not None:
            await self._tool.leave(place)
