"""Plug-ins in Ray actors of their own, as the driver keeps them; `rlsys.places` is the view of those who call them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from rlsys import cluster
from rlsys.cluster import Actor, Demand
from rlsys.config import Config, PoolConfig, PooledPlugIn, RewardConfig, require
from rlsys.errors import ActorTimeoutError, ResourceError, RlsysError
from rlsys.plugins import resolve

log = logging.getLogger(__name__)

TOOL_ACTOR = "rlsys.actors.tool:ToolActor"
REWARD_ACTOR = "rlsys.actors.reward:RewardActor"
CLOSE_SECONDS = 10.0
RETURN_WATCH_SECONDS = 0.5
"""Pause between looks at an actor that is being replaced."""


def pooled_plug_ins(config: Config) -> Mapping[str, PooledPlugIn]:
    """The plug-ins with actors of their own, by their place in the configuration, such as `tools.0` or `rewards.1`."""
    places: dict[str, PooledPlugIn] = {f"tools.{index}": tool for index, tool in enumerate(config.tools)}
    places |= {f"rewards.{index}": reward for index, reward in enumerate(config.rewards)}
    return {place: plug_in for place, plug_in in places.items() if plug_in.actors is not None}


def pool_demands(config: Config) -> list[Demand]:
    """What the pools take from the cluster when a run begins."""
    return [_demand(place, plug_in) for place, plug_in in pooled_plug_ins(config).items()]


def _demand(place: str, plug_in: PooledPlugIn, count: int | None = None) -> Demand:
    pool = _settings(plug_in)
    return Demand(
        what=f"{place} actor",
        count=pool.count if count is None else count,
        cpus=pool.cpus,
        gpus=pool.gpus,
        resources=pool.resources,
    )


def _settings(plug_in: PooledPlugIn) -> PoolConfig:
    assert plug_in.actors is not None, "without an `actors` section there is no pool"
    return plug_in.actors


class ActorPool:
    """The actors that host one plug-in, in the driver: started, watched, made more or fewer, ended.

    Ray replaces one that dies. One that hangs, or says that it is worn out, is noticed and killed here, so that it is
    replaced too.
    """

    def __init__(self, plug_in: PooledPlugIn, *, place: str, host: str | None = None) -> None:
        self.actors: list[Actor] = []
        self._plug_in = plug_in
        self._settings = _settings(plug_in)
        self._place = place
        self._host = resolve(host or (REWARD_ACTOR if isinstance(plug_in, RewardConfig) else TOOL_ACTOR), place=place)
        self.note: Callable[[str, str], None] = lambda name, what: log.info("%s %s", name, what)
        """Is told what happens to which actor."""
        self._num_placed = 0
        self._coming_back: set[str] = set()
        self._tell: Callable[[Sequence[Actor]], Awaitable[object]] | None = None
        self._resizing = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Place the first actors and start the plug-in in each.

        Raises:
            ActorError: the plug-in cannot start; says why.
            ResourceError: an actor was not placed, or its plug-in did not start, in time.
        """
        self.actors = await self._started(self._settings.count)
        self._watching = asyncio.create_task(self._watch())

    async def serve(self, tell: Callable[[Sequence[Actor]], Awaitable[object]]) -> None:
        """Give the actors to `tell`, now and after every change."""
        self._tell = tell
        await tell(self.actors)

    async def resize(self, count: int, *, drain_seconds: float = 60.0) -> None:
        """Have `count` actors from now on; returns when the new ones serve, or the surplus has ended.

        A surplus actor begins no session any more and ends with its last one, or after `drain_seconds`; sessions that
        are open then go on in the others as if it had died.

        Raises:
            ConfigError: `count` is below 1.
            ResourceError: the cluster had no room for the new ones in time; the pool stays as it was.
            ActorError: a new one did not start; the pool stays as it was.
        """
        require(count >= 1, f"{self._place} cannot have {count} actors; a pool keeps at least 1")
        async with self._resizing:
            more = await self._started(count - len(self.actors)) if count > len(self.actors) else []
            surplus = self.actors[count:]
            self.actors = self.actors[:count] + more
            try:
                if self._tell is not None:
                    await self._tell(self.actors)
            finally:
                await asyncio.gather(*(self._end(actor, drain_seconds) for actor in surplus))

    async def close(self) -> None:
        """End all actors, sessions and plug-ins first."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        async with self._resizing:
            actors, self.actors = self.actors, []
            await asyncio.gather(*(self._end(actor, 0.0) for actor in actors))

    async def _started(self, count: int) -> list[Actor]:
        demand = _demand(self._place, self._plug_in, count)
        actors = cluster.place(
            self._host,
            demand,
            [{"plug_in": self._plug_in, "place": self._place}] * count,
            call_seconds=self._settings.call_seconds,
            concurrency=2 * self._settings.max_sessions + 1024,
            first_index=self._num_placed,
            restarts=True,
        )
        self._num_placed += count  # a name is not used twice: callers tell actors apart by it
        try:
            await asyncio.gather(*(actor.call("start", seconds=self._settings.start_seconds) for actor in actors))
        except BaseException as error:
            for actor in actors:
                actor.kill()
            if isinstance(error, ActorTimeoutError):
                raise ResourceError(
                    f"{error}; the cluster may lack {cluster.words(demand.each)} for each of {count} more"
                ) from error
            raise
        return actors

    async def _end(self, actor: Actor, drain_seconds: float) -> None:
        try:
            await actor.call("drain", drain_seconds, seconds=drain_seconds + CLOSE_SECONDS)
            await actor.call("close_all", seconds=CLOSE_SECONDS)
        except RlsysError as error:
            log.warning("%s; it is killed all the same", error)
        finally:
            actor.kill()

    async def _watch(self) -> None:
        """Look at each actor again and again; no look waits for the one at another actor.

        One that is being replaced is looked at more often, so that it soon serves again.
        """
        looks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for actor in self.actors:
                    if actor.name not in looks:
                        look = looks[actor.name] = asyncio.create_task(self._look_at(actor))
                        look.add_done_callback(partial(looks.pop, actor.name))
                pause = self._settings.watch_seconds
                if any(actor.name in self._coming_back for actor in self.actors):
                    pause = min(pause, RETURN_WATCH_SECONDS)
                await asyncio.sleep(pause)
        finally:
            for look in list(looks.values()):
                look.cancel()

    async def _look_at(self, actor: Actor) -> None:
        """Ray sees a process end and makes a new one; it sees none that hangs, and starts nothing in a new one."""
        try:
            state = await actor.call("state", seconds=self._plug_in.look_seconds)
            if state == "new":  # no look has to wait until a model is loaded, and no grading begins before
                await self._start_anew(actor)
                self.note(actor.name, "was replaced and serves")
            elif state == "worn out":
                self._replace(actor, f"{actor.name} holds threads that hang")
                return
            self._coming_back.discard(actor.name)
        except ActorTimeoutError as error:
            self._replace(actor, str(error))
        except RlsysError as error:
            if actor.name not in self._coming_back:
                self.note(actor.name, f"is lost: {error}; Ray replaces it, or it is tried again")
            self._coming_back.add(actor.name)

    async def _start_anew(self, actor: Actor) -> None:
        try:
            await actor.call("start", seconds=self._settings.start_seconds)
        except RlsysError as error:
            log.warning("%s; what was made in the place of an actor that died cannot start so far", error)
            raise

    def _replace(self, actor: Actor, why: str) -> None:
        if actor in self.actors:
            self.note(actor.name, f"is killed and replaced: {why}")
            self._coming_back.add(actor.name)
            actor.kill(restart=True)
