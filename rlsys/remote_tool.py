"""A tool in actors of its own, as a rollout sees it: sessions that outlive the actor in which they began."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.cluster import Actor
from rlsys.config import PoolConfig
from rlsys.errors import ActorError, ToolError
from rlsys.interfaces import Tool, ToolResult
from rlsys.places import MAX_ATTEMPTS, Place, Places
from rlsys.plugins import run_hook

log = logging.getLogger(__name__)


class RemoteTool:
    """Looks and answers like the tool that it is made from, but its sessions live in the actors of a pool.

    A rollout that holds a session of one full pool and waits for another's gives way at the deadline: it is dropped.
    """

    def __init__(self, tool: Tool, pool: PoolConfig) -> None:
        self._local = tool
        self.name = tool.name
        self.description = tool.description
        self.parameters = tool.parameters
        self.pool = pool
        self._places = Places(f"tool {tool.name!r}", pool, ToolError, open_seconds=pool.call_seconds)

    async def start(self) -> None:
        """Start the local tool for a moment where it does not know before what it is, as one that asks a server."""
        if not self._local.description:
            await run_hook(self._local, "start")
            self.description, self.parameters = self._local.description, self._local.parameters
            await run_hook(self._local, "close")

    def use_actors(self, actors: Sequence[Actor]) -> None:
        """From now on, begin sessions in these; those that are open stay where they are."""
        self._places.use_actors(actors)

    async def open(self, rollout_id: str) -> RemoteSession:
        """Begin a session in the actor that carries the fewest of this caller's.

        Raises:
            ToolError: no actor had room within the pool's `wait_seconds`, or the tool raised.
        """
        return RemoteSession(self._places, self, rollout_id, await self._places.find(rollout_id))


class RemoteSession:
    """One rollout's use of a remote tool, with a journal of what the policy has read.

    Where its actor dies, hangs or has forgotten the session, one is opened in another actor, the calls of the journal
    are made again there, and every answer is compared with the one that was read. Then the session is what the policy
    believes it to be, also where the policy itself had lost its state, as that is read in the answers. A call that was
    under way is made again only then, in the new session, so that what it did in the lost one does not count twice.
    """

    def __init__(self, places: Places, tool: RemoteTool, rollout_id: str, place: Place) -> None:
        self._places = places
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
                    self._places.leave_behind(self._place)
                    self._place = None
            else:
                self._journal.append((arguments, result))
                return result
        raise ToolError(
            f"tool {self._tool.name!r}: {MAX_ATTEMPTS} actors in a row did not survive one call; the last: {failure}"
        )

    async def _current_place(self) -> Place:
        if self._place is None:
            place = await self._places.find(self._rollout_id)
            try:
                await self._replay(place)
            except BaseException:
                self._places.leave_behind(place)
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
            await self._places.leave(place)
