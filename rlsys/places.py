"""Places in the actors of a pool, as one of their callers finds, waits for and gives them back."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsys.cluster import Actor
from rlsys.config import PoolConfig
from rlsys.errors import ActorError, RlsysError

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""What so many actors in a row did not survive is not tried on another one."""
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a session, or a grading, lives."""

    actor: Actor
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Places:
    """Finds places in the actor that carries the fewest of this caller's.

    A full actor says so. Where all are full, callers stand in line, so that only the first one asks again and again. An
    actor has `open(session_id, label)`, which says whether there is room, and `close(session_id)`. `what` names the
    plug-in in messages, and where no place is found in time a `failure` is raised. An actor that does not say within
    `open_seconds` whether there is room is passed over.
    """

    def __init__(self, what: str, pool: PoolConfig, failure: type[RlsysError], *, open_seconds: float) -> None:
        self._what, self._pool, self._failure = what, pool, failure
        self._open_seconds = min(open_seconds, pool.call_seconds)
        self._roster = _Roster()
        self._line = asyncio.Lock()
        self._news = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    def use_actors(self, actors: Sequence[Actor]) -> None:
        """From now on, find places in these; those that are taken stay where they are."""
        self._roster.actors = tuple(actors)
        self._news.set()

    async def find(self, label: str) -> Place:
        """Take a place.

        Raises:
            RlsysError: no actor had room within the pool's `wait_seconds`, or what its `open` raised.
        """
        deadline = time.monotonic() + self._pool.wait_seconds
        if not self._line.locked() and (place := await self._ask_all(label, deadline)) is not None:
            return place
        try:
            await asyncio.wait_for(self._line.acquire(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise self._no_place() from None
        try:
            pause = FIRST_PAUSE_SECONDS
            while (left := deadline - time.monotonic()) > 0:
                self._news.clear()
                if (place := await self._ask_all(label, deadline)) is not None:
                    return place
                await self._wait_for_news(min(pause, left))
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            raise self._no_place()
        finally:
            self._line.release()

    def _no_place(self) -> RlsysError:
        return self._failure(
            f"{self._what}: none of its {len(self._roster.actors)} actors had a place within "
            f"{self._pool.wait_seconds:g} s; give it more actors (count) or room in each (max_sessions)"
        )

    async def _wait_for_news(self, seconds: float) -> None:
        """Wait until a place of this caller's was given back or the actors have changed, at most so long."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({news}, timeout=seconds)
        finally:
            news.cancel()

    async def _ask_all(self, label: str, deadline: float) -> Place | None:
        for actor in self._roster.best_first():
            left = max(FIRST_PAUSE_SECONDS, deadline - time.monotonic())
            if (place := await self._ask(actor, label, min(self._open_seconds, left))) is not None:
                return place
        return None

    async def _ask(self, actor: Actor, label: str, seconds: float) -> Place | None:
        """Take a place in this actor; None where it is full or does not answer."""
        place = Place(actor)
        self._roster.load[actor.name] += 1
        try:
            if await actor.call("open", place.session_id, label, seconds=seconds):
                return place
        except ActorError as error:
            log.warning("%s; other actors are asked for a place", error)
            self.leave_behind(place)
            return None
        except BaseException:  # the plug-in raised or the rollout was cancelled
            self.leave_behind(place)
            raise
        self._roster.load[actor.name] -= 1
        return None

    def give_back(self, place: Place) -> None:
        """Note that the actor has ended what was in this place."""
        self._roster.load[place.actor.name] -= 1
        self._news.set()

    async def leave(self, place: Place) -> None:
        """End what is in a place; where the actor died it has ended with it. Raises what the plug-in raises."""
        try:
            await place.actor.call("close", place.session_id, seconds=self._pool.call_seconds)
        except ActorError as error:
            log.info("%s; what was in it ends with it", error)
        finally:
            self.give_back(place)

    def leave_behind(self, place: Place) -> None:
        """Give up an actor that failed, which may yet be alive and keep the place.

        It is told to end what is there, and is not asked for another place before it has answered.
        """
        self._roster.unanswered[place.actor.name] += 1
        task = asyncio.ensure_future(self._leave_unwatched(place))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave_unwatched(self, place: Place) -> None:
        try:
            await self.leave(place)
        except RlsysError as error:
            log.warning("%s; its place had been given up before", error)
        finally:
            self._roster.unanswered[place.actor.name] -= 1


class _Roster:
    """The actors of a pool as one of their callers knows them."""

    def __init__(self) -> None:
        self.actors: Sequence[Actor] = ()
        self.load: Counter[str] = Counter()
        """What each carries for this caller, by its name."""
        self.unanswered: Counter[str] = Counter()
        """Requests to each that this caller gave up and that have not been answered since."""

    def best_first(self) -> list[Actor]:
        """Those that answer, the least loaded first; random among equals, so that callers spread."""
        willing = [actor for actor in self.actors if not self.unanswered[actor.name]]
        return sorted(willing, key=lambda actor: (self.load[actor.name], random.random()))
