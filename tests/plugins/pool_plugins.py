"""Plug-ins for the tests of pools: a tool whose every kind of trouble can be ordered, and who calls it through Ray."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rlsys.actors.tool import ToolActor
from rlsys.cluster import Actor
from rlsys.config import PoolConfig
from rlsys.errors import ActorError, ActorTimeoutError, RlsysError
from rlsys.interfaces import ToolResult
from rlsys.plugins import build
from rlsys.remote_tool import RemoteSession, RemoteTool
from rlsys.types import Problem

MARKS = itertools.count()
EVENTS: list[str] = []
HOOKS: dict[str, Callable[[], Awaitable[None]]] = {}


def zero(_problem: Problem, _response: str) -> float:
    """A reward."""
    return 0.0


class Adder:
    """Keeps a sum in every session; what happens in it is noted in EVENTS. Arguments, each optional:

    `add` a number, `hook` awaits the HOOKS of that name first, `mark` gives another text each time, `fail` raises.
    """

    name, description = "adder", "adds up"
    parameters: Mapping[str, Any] = {"type": "object"}

    def __init__(self, *, fail: str = "") -> None:
        self.fail = fail

    async def start(self) -> None:
        EVENTS.append("start")
        if self.fail == "start":
            raise RuntimeError("no sandbox on this host")

    async def open(self, rollout_id: str) -> AdderSession:
        EVENTS.append(f"open {rollout_id}")
        if "open" in HOOKS:
            await HOOKS["open"]()
        if self.fail == "open":
            raise RuntimeError("no room on this host")
        return AdderSession(self, rollout_id)

    def close(self) -> None:
        EVENTS.append("end")


class SlowlyEndingAdder(Adder):
    """One with an asynchronous `close`."""

    async def close(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        EVENTS.append("end, awaited")


class AdderSession:
    def __init__(self, tool: Adder, rollout_id: str) -> None:
        self.tool = tool
        self.rollout_id = rollout_id
        self.sum = 0

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        if "hook" in arguments:
            await HOOKS[arguments["hook"]]()
        if "fail" in arguments:
            raise RuntimeError(arguments["fail"])
        if "mark" in arguments:
            return ToolResult(text=f"mark {next(MARKS)}")
        self.sum += arguments.get("add", 0)
        return ToolResult(text=f"sum {self.sum}", ok=self.sum >= 0)

    async def close(self) -> None:
        EVENTS.append(f"close {self.rollout_id}")
        self.sum = -1000  # what it answers from now on is wrong
        if "close" in HOOKS:
            await HOOKS["close"]()
        if self.tool.fail == "close":
            raise RuntimeError("cannot end")


class TellingToolActor(ToolActor):
    """Says in which process it lives, so that a test can kill it."""

    async def pid(self) -> int:
        return os.getpid()


class Caller:
    """Uses a remote tool from a process of its own, as a rollout actor does."""

    def __init__(self, *, use: str, pool: PoolConfig) -> None:
        self._tool = RemoteTool(build(use, {}, place="test"), pool)
        self._sessions: dict[str, RemoteSession] = {}

    async def use_actors(self, actors: Sequence[Actor]) -> None:
        self._tool.use_actors(actors)

    async def open(self, rollout_id: str) -> None:
        self._sessions[rollout_id] = await self._tool.open(rollout_id)

    async def ask(self, rollout_id: str, arguments: Mapping[str, Any]) -> ToolResult:
        return await self._sessions[rollout_id].call(arguments)

    async def close(self, rollout_id: str) -> None:
        await self._sessions.pop(rollout_id).close()


async def never() -> None:
    await asyncio.Event().wait()


class FakeActor:
    """An actor with the manners of one that Ray placed: it has deadlines, dies in mid-call, comes back empty."""

    def __init__(self, name: str, plug_in: Any, host_class: Any = ToolActor) -> None:
        self.name = name
        self.awake = asyncio.Event()
        self.awake.set()
        self.killed: list[str] = []
        self.asked: list[str] = []
        self._plug_in, self._host_class = plug_in, host_class
        self.come_back()

    def come_back(self) -> None:
        """A new process with the same arguments."""
        self.host = self._host_class(plug_in=self._plug_in, place=self.name.partition(" ")[0])
        self._death = asyncio.Event()

    @property
    def alive(self) -> bool:
        return not self._death.is_set()

    def die(self) -> None:
        self._death.set()

    def kill(self, *, restart: bool = False) -> None:
        self.killed.append("to be replaced" if restart else "for good")
        self.die()

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        self.asked.append(method)
        work = asyncio.ensure_future(self._work(method, *args))
        death = asyncio.ensure_future(self._death.wait())
        await asyncio.wait({work, death}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        death.cancel()
        if not work.done() and not self.alive:
            work.cancel()
            raise ActorError(f"{self.name} died during {method}")
        if not work.done():  # it goes on, as it would in another process
            raise ActorTimeoutError(f"{self.name}.{method} did not answer within {seconds:g} s")
        try:
            return work.result()
        except RlsysError:
            raise
        except Exception as error:
            raise ActorError(f"{self.name}.{method} raised {type(error).__name__}: {error}") from error

    async def _work(self, method: str, *args: Any) -> Any:
        await (self.awake.wait() if self.alive else never())
        return await getattr(self.host, method)(*args)
