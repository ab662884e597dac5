"""The tool actor: one tool in a process of its own, with the sessions of many rollouts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Literal

from rlsys.config import PooledPlugIn
from rlsys.errors import ActorError, failures_of_tool
from rlsys.function_tool import build_tool
from rlsys.interfaces import Session, Tool, ToolResult
from rlsys.plugins import isolation_of, run_hook


class ToolActor:
    """Hosts one tool. A plain class: Ray only places it, and makes it anew where its process died.

    A new one starts its tool with the first session and knows none of the sessions before; their callers read that from
    the ActorError and begin again elsewhere.
    """

    def __init__(self, *, plug_in: PooledPlugIn, place: str) -> None:
        assert plug_in.actors is not None
        self._max_sessions = plug_in.actors.max_sessions
        self._tool: Tool = build_tool(plug_in, place=place)
        self._place = place
        self._starting = asyncio.Lock()
        self._is_started = False
        self._sessions: dict[str, asyncio.Task[Session]] = {}
        self._num_closing = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Start the tool; raises what it raises."""
        async with self._starting:
            if not self._is_started:
                await run_hook(self._tool, "start")
                self._is_started = True

    async def isolation(self) -> dict[str, str]:
        """The tool's tier, where it has one."""
        return isolation_of([self._tool])

    def _has_room(self) -> bool:
        return not self._draining and len(self._sessions) + self._num_closing < self._max_sessions

    async def open(self, session_id: str, rollout_id: str) -> bool:
        """Begin a session; False where there is no room for it.

        Raises:
            ActorError: the tool cannot start on this host.
            ToolError: the tool cannot open a session.
        """
        try:
            await self.start()
        except Exception as error:  # whatever it is, another host may do better
            raise ActorError(f"{self._place} cannot start: {type(error).__name__}: {error}") from error
        if not self._has_room():
            return False
        self._idle.clear()
        opening = self._sessions[session_id] = asyncio.create_task(self._open(rollout_id))
        await asyncio.wait({opening})
        if opening.cancelled():  # by `close`, because the caller has given up
            return False
        if opening.exception() is not None:
            self._sessions.pop(session_id, None)
            self._note_idle()
        opening.result()
        return True

    async def _open(self, rollout_id: str) -> Session:
        with failures_of_tool(self._tool.name):
            return await self._tool.open(rollout_id)

    async def call(self, session_id: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Make one call in a session.

        Raises:
            ActorError: there is no such session, or it was closed in the middle of the call.
            ToolError: the tool raised.
        """
        self._require(session_id)
        session = await self._sessions[session_id]
        try:
            with failures_of_tool(self._tool.name):
                return await session.call(arguments)
        finally:
            self._require(session_id)  # what a session says because it is being closed is no answer to the policy

    def _require(self, session_id: str) -> None:
        if session_id not in self._sessions:
            raise ActorError(f"{self._place}: the session is unknown; its actor was replaced or is about to end")

    async def close(self, session_id: str) -> None:
        """End a session, also one that is still being opened; one that is unknown has ended already."""
        opening = self._sessions.pop(session_id, None)
        if opening is None:
            return
        self._num_closing += 1  # it takes its place until it has ended
        try:
            opening.cancel()
            await asyncio.wait({opening})
            if not opening.cancelled() and opening.exception() is None:
                with failures_of_tool(self._tool.name):
                    await opening.result().close()
        finally:
            self._num_closing -= 1
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._sessions and not self._num_closing:
            self._idle.set()

    async def num_sessions(self) -> int:
        """How many sessions are open."""
        return len(self._sessions) + self._num_closing

    async def state(self) -> Literal["well"]:
        """One that answers at all is well; a new one starts its tool by itself."""
        return "well"

    async def drain(self, wait_seconds: float) -> int:
        """Begin no session any more and wait for the last one to end; returns how many are open after all."""
        self._draining = True
        with contextlib.suppress(TimeoutError):  # the answer says how it ended
            await asyncio.wait_for(self._idle.wait(), wait_seconds)
        return await self.num_sessions()

    async def close_all(self) -> None:
        """End every session, then the tool."""
        self._draining = True
        closings = (self.close(session_id) for session_id in list(self._sessions))
        failures = [result for result in await asyncio.gather(*closings, return_exceptions=True) if result is not None]
        await run_hook(self._tool, "close")
        for failure in failures:
            raise failure
