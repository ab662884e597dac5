"""The driver's end of `rlsys scale`: requests in `RUN/control` are claimed, looked at, done and answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.cluster import Demand
from rlsys.config import Config
from rlsys.control import (
    ANSWER_ENDING,
    CONTROL,
    REQUEST_ENDING,
    ROLLOUTS,
    Answer,
    Request,
    State,
    read_request,
    write_whole,
)
from rlsys.errors import ConfigError, ResourceError, RlsysError
from rlsys.status import Live
from rlsys.workers import WorkerState

if TYPE_CHECKING:
    from rlsys.fleet import RolloutFleet
    from rlsys.pool import ActorPool

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.3
"""How often the driver looks for requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """One number that is to change."""

    name: str
    before: int
    after: int
    what: str
    """What a `Demand` calls it."""
    pool: ActorPool | None
    """None for the rollout workers."""


class Scaling:
    """Watches a run directory for requests and carries them out on the fleet that is live.

    `demands` says what a stage takes from the cluster as configured, and `no_room` what is missing for more (see
    `cluster.no_room`).
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        live: Live,
        *,
        driver: str,
        demands: Callable[[str], Sequence[Demand]],
        no_room: Callable[..., Awaitable[str | None]],
        ask_for: Callable[[Sequence[Demand]], None],
        tell: Callable[[str], None],
    ) -> None:
        self._config, self._folder, self._live, self._driver = config, folder / CONTROL, live, driver
        self._demands, self._no_room, self._ask_for, self._tell = demands, no_room, ask_for, tell
        self._deciding = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """While inside, requests are answered; those that were made of an earlier driver are thrown away."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            for task in (watching, *self._tasks):
                task.cancel()
            await asyncio.gather(watching, *self._tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            for path in await asyncio.to_thread(self._requests):
                task = asyncio.create_task(self._claim(path))
                self._tasks.add(task)
                task.add_done_callback(self._ended)
            await asyncio.sleep(_LOOK_SECONDS)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request to scale could not be answered", exc_info=error)

    def _requests(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"*{REQUEST_ENDING}") if not path.name.startswith("."))

    async def _claim(self, path: Path) -> None:
        answer = _Answering(path.with_name(path.name.removesuffix(REQUEST_ENDING) + ANSWER_ENDING))
        try:
            request: Request | ConfigError = read_request(path)
        except ConfigError as error:
            request = error
        except FileNotFoundError:
            return
        if isinstance(request, Request) and request.driver != self._driver:
            path.unlink(missing_ok=True)
            return
        answer.write("looking", "looking whether there is room in the cluster")
        try:
            path.unlink()
        except FileNotFoundError:  # taken back
            answer.path.unlink()
            return
        try:
            if isinstance(request, ConfigError):
                raise request
            await self._carry_out(request, answer)
        except asyncio.CancelledError:
            answer.write("failed", f"the run ended before this was done (it stood at: {answer.message})")
            raise
        except RlsysError as error:
            answer.write("failed" if answer.accepted else "refused", str(error))
            self._tell(f"scale: {error}")
        finally:
            if answer.state in ("looking", "accepted"):
                answer.write("failed", "the driver failed at this; what it printed says why")

    async def _carry_out(self, request: Request, answer: _Answering) -> None:
        fleet = self._live.fleet
        async with self._deciding:  # so that two requests do not both get the last room
            changes = self._changes(request)
            assert fleet is not None, "without a fleet there are no changes"
            await self._find_room(changes)
            for change in changes:
                if change.pool is None:
                    await fleet.resize(change.after)
        said = ", ".join(f"{change.name} {change.before} -> {change.after}" for change in changes)
        answer.write("accepted", f"accepted: {said}")
        self._tell(f"scale: {said}")
        settling = (self._settled(fleet, change, answer) for change in changes)
        failed = [one for one in await asyncio.gather(*settling, return_exceptions=True) if one is not None]
        if failed:
            raise failed[0]
        if any(change.after < change.before for change in changes):
            self._ask_for(self._whole(changes))
        answer.write("done", f"{said}, after {answer.seconds:.1f} s")
        self._tell(f"scale: {said} after {answer.seconds:.1f} s")

    def _changes(self, request: Request) -> list[_Change]:
        """What is to change.

        Raises:
            ConfigError: some of it cannot be; then nothing is changed.
        """
        fleet, stage = self._live.fleet, self._live.stage
        if fleet is None:
            raise ConfigError(
                f"the stage {stage or 'that begins'} has no rollout actors (yet); the run's stages are "
                f"{', '.join(self._config.stages)}, and each begins with actors.count={self._config.actors.count}"
            )
        pools = self._live.pools(self._config)
        changes = []
        for asked, count in request.counts.items():
            if asked == ROLLOUTS:
                roster = fleet.roster
                _within(count, roster.minimum, roster.maximum)
                changes.append(
                    _Change(name=ROLLOUTS, before=roster.target, after=count, what="rollout actor", pool=None)
                )
            else:
                name = _pool_meant(asked, pools)
                pool = pools[name]
                place = next(place for place, one in fleet.pools.items() if one is pool)
                changes.append(
                    _Change(name=name, before=len(pool.actors), after=count, what=f"{place} actor", pool=pool)
                )
        return changes

    async def _find_room(self, changes: Sequence[_Change]) -> None:
        """Raise a ResourceError where the cluster has no room for what is more."""
        by_what = {demand.what: demand for demand in self._demands(self._live.stage)}
        more = [
            replace(by_what[change.what], count=change.after - change.before)
            for change in changes
            if change.after > change.before
        ]
        if not more:
            return
        now = [replace(change, after=change.before) for change in changes]
        seconds = self._config.cluster.wait_seconds
        missing = await self._no_room(more, beside=self._whole(now), wait_seconds=seconds)
        if missing is not None:
            has = ", ".join(f"{change.name} {change.before}" for change in changes)
            raise ResourceError(
                f"no room for more: {missing}; the run goes on as it was ({has}); waited {seconds:g} s "
                "(cluster.wait_seconds)"
            )

    def _whole(self, changes: Sequence[_Change]) -> list[Demand]:
        """All that the run takes from the cluster once these are done."""
        counts = {change.what: change.after for change in changes}
        fleet = self._live.fleet
        if fleet is not None:
            counts.setdefault("rollout actor", fleet.roster.target)
            for place, pool in fleet.pools.items():
                counts.setdefault(f"{place} actor", len(pool.actors))
        return [
            replace(demand, count=counts.get(demand.what, demand.count)) for demand in self._demands(self._live.stage)
        ]

    async def _settled(self, fleet: RolloutFleet, change: _Change, answer: _Answering) -> None:
        """Return when the new ones serve and the surplus has left.

        Raises:
            ResourceError: that does not come about.
        """
        if change.pool is not None:
            await change.pool.resize(change.after)
            return
        roster, actors = fleet.roster, self._config.actors
        deadline = time.monotonic() + actors.start_seconds + actors.sync_seconds + actors.drain_seconds
        while len(roster.serving) != change.after or len(roster.workers) != change.after:
            there = ", ".join(f"{count} {state}" for state, count in roster.counts.items()) or "none"
            answer.write("accepted", f"{change.name} {change.before} -> {change.after}: {there}")
            if self._live.fleet is not fleet:
                raise ResourceError(
                    f"the stage ended before {change.after} rollout workers served; there were: {there}"
                )
            if roster.target != change.after:
                raise ResourceError(f"a later request asked for {roster.target} rollout workers; there are {there}")
            if (fleet.has_given_up and not roster.in_state(WorkerState.STARTING)) or time.monotonic() > deadline:
                left = max(roster.minimum, min(len(roster.staying), change.after))
                await fleet.resize(left)
                last = ": ".join(fleet.events[-1][1:]) if fleet.events else "nothing"
                raise ResourceError(
                    f"{change.after} rollout workers were asked for, and there are: {there}; the run goes on with "
                    f"{left}; what happened last: {last}"
                )
            await fleet.bell.heard(1.0)


class _Answering:
    """The answer to one request, renewed when it changes."""

    def __init__(self, path: Path) -> None:
        self.path, self.state, self.message, self.accepted = path, "", "", False
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the request was claimed."""
        return time.monotonic() - self._started

    def write(self, state: State, message: str) -> None:
        """Say how far it is."""
        self.accepted = self.accepted or state == "accepted"
        if (state, message) == (self.state, self.message):
            return
        self.state, self.message = state, message
        try:
            write_whole(self.path, asdict(Answer(state=state, message=message, seconds=self.seconds)))
        except OSError as error:
            log.warning("an answer to a request could not be written: %s", error)


def _within(count: int, minimum: int, maximum: int | None) -> None:
    if count < minimum:
        raise ConfigError(f"--rollouts {count} is below actors.min ({minimum}); the run goes on as it was")
    if maximum is not None and count > maximum:
        raise ConfigError(f"--rollouts {count} is above actors.max ({maximum}); the run goes on as it was")


def _pool_meant(asked: str, pools: Mapping[str, ActorPool]) -> str:
    """The pool that `rewards.NAME`, `tools.NAME`, or `rewards` or `tools` alone means.

    Raises:
        ConfigError: none, or several.
    """
    kind, _, name = asked.partition(".")
    here = [pool for pool in pools if pool.startswith(f"{kind}.")]
    if asked in pools:
        return asked
    names = ", ".join(pool.partition(".")[2] for pool in here) or "none"
    if name:
        raise ConfigError(
            f"--{kind} {name}: no such one of the {kind} has actors of its own; those that have: {names} "
            f"(give it an `actors` section in the configuration)"
        )
    if len(here) != 1:
        raise ConfigError(f"--{kind} N takes one of the {kind} with actors of its own; there are: {names}; say NAME=N")
    return here[0]
