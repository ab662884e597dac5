"""The rollout workers of a live run: given work, replaced when they die, made more or fewer while training goes on.

Who is there and what each may do is `rlsys.workers`; who gets what is `rlsys.dispatch`; how one worker lives and is
watched is `rlsys.worker_life`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from rlsys import cluster
from rlsys.cluster import Actor, Demand
from rlsys.config import ActorsConfig, Config, SamplingConfig
from rlsys.demonstrations import Segments
from rlsys.dispatch import Dispatch
from rlsys.errors import ActorError, ActorTimeoutError, FleetLostError, RlsysError
from rlsys.plugins import resolve
from rlsys.pool import ActorPool, pooled_plug_ins
from rlsys.types import Problem, RolloutGroup
from rlsys.worker_life import LOST, Bell, Place, WorkerLife
from rlsys.workers import QueueFollower, Roster, WorkerState

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 60.0
"""A fleet that follows the queue shrinks to what it needed in this time."""
_MAX_FAILED_STARTS = 3
"""So many workers in a row that could not start, and no more are started until somebody asks for them."""


def rollout_demand(config: Config) -> Demand:
    """What the rollout actors take from the cluster when a run begins."""
    actors = config.actors
    return Demand(
        what="rollout actor", count=actors.count, cpus=actors.cpus, gpus=actors.gpus, resources=actors.resources
    )


class RolloutFleet:
    """The rollout workers, and the pools of plug-ins with actors of their own, by their place in the configuration.

    Deadlines are measured by the clock of the running event loop.
    """

    def __init__(self, settings: ActorsConfig, place: Place, pools: Mapping[str, ActorPool] | None = None) -> None:
        self.settings = settings
        self.pools = dict(pools or {})
        self.roster = Roster(
            target=settings.count,
            minimum=settings.min,
            maximum=settings.max,
            capacity=2 * settings.max_rollouts,
        )
        self.backend = ""
        """The name of the engines' weight transfer back end."""
        self.events: deque[tuple[float, str, str]] = deque(maxlen=1000)
        """What happened, for people: when (`time.time`), to whom, what."""
        self.bell = Bell()
        """Rings at every change."""
        self.frozen = False
        """Whether engines are paused for new weights; then nobody expects tokens of them."""
        self.follows_learner = False
        """Whether a worker must be given a learner's weights before it serves."""
        self.follows_queue = settings.max is not None
        """Whether the number of workers follows the work that waits."""
        self.num_redispatched = 0
        """Groups that were given to another worker."""
        self.dispatch = Dispatch(self.roster)
        self._place = place
        self._lives: dict[str, WorkerLife] = {}
        self._failed_starts = 0
        self._start_failure: RlsysError | None = None
        self._first_version = 0
        self._keeper: asyncio.Task[None] | None = None

    # --- beginning and end -------------------------------------------------------------------------------------------

    @classmethod
    async def start(cls, config: Config, model_path: str) -> RolloutFleet:
        """Place the workers and start engines and pools, side by side.

        Raises:
            ActorError, ResourceError: one of them cannot start; says why.
        """
        pools = {place: ActorPool(plug_in, place=place) for place, plug_in in pooled_plug_ins(config).items()}
        fleet = cls(config.actors, partial(_placed, config, model_path), pools)
        try:
            await asyncio.gather(fleet.started(), *(pool.start() for pool in pools.values()))
            for place, pool in pools.items():
                pool.note = fleet.note
                await pool.serve(partial(fleet.use_actors, place))
        except BaseException:
            await fleet.close()
            raise
        return fleet

    async def started(self) -> None:
        """Start the first workers, return when all of them have, and keep them from then on.

        Raises:
            RlsysError: one could not start.
        """
        self._fill()
        while self.roster.in_state(WorkerState.STARTING) and self._start_failure is None:
            await self.bell.heard()
        if self._start_failure is not None:
            raise self._start_failure
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """End all workers, politely first, because their engines have processes of their own."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.gather(*(life.end() for life in list(self._lives.values())))
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))

    # --- work --------------------------------------------------------------------------------------------------------

    async def act(
        self,
        problem: Problem,
        *,
        size: int,
        sampling: SamplingConfig,
        group_id: str,
        prefix: Segments = (),
        **more: Any,
    ) -> RolloutGroup:
        """Roll out one problem on the least loaded worker; the policy goes on behind `prefix`.

        Where the worker dies another one begins anew. A problem that `actors.attempts` workers did not survive, or on
        which they failed, comes back without a rollout, as quarantined.

        Raises:
            FleetLostError: no worker has served for `actors.wait_seconds`.
        """
        keywords = {"sampling": sampling, "prefix": prefix, **more}
        num_parts = min(size, len(self.roster.serving)) if self.settings.siblings == "spread" else 1
        if num_parts <= 1:
            return await self._act_together(problem, size=size, group_id=group_id, **keywords)
        sizes = [size // num_parts + (number < size % num_parts) for number in range(num_parts)]
        parts = await asyncio.gather(
            *(
                self._act_together(problem, size=part, group_id=f"{group_id}-part-{number}", **keywords)
                for number, part in enumerate(sizes)
            )
        )
        return RolloutGroup(
            problem=problem,
            rollouts=tuple(rollout for part in parts for rollout in part.rollouts),
            dropped=dict(sum((Counter(part.dropped) for part in parts), Counter())),
        )

    async def _act_together(self, problem: Problem, *, size: int, group_id: str, **keywords: Any) -> RolloutGroup:
        failures: list[ActorError] = []
        while len(failures) < self.settings.attempts:
            name = f"{group_id}-again-{len(failures)}" if failures else group_id
            try:
                return await self._on_one("act", problem, weight=size, size=size, group_id=name, **keywords)
            except _LeftEarly:
                self.num_redispatched += 1
            except ActorError as error:
                failures.append(error)
                self.num_redispatched += 1
                log.warning("problem %s is given to another worker: %s", problem.id, error)
        self.note("-", f"problem {problem.id} is quarantined: {failures[-1]}")
        return RolloutGroup(problem=problem, rollouts=(), dropped={f"quarantined: {failures[-1]}": size})

    async def compare(self, group: RolloutGroup) -> RolloutGroup:
        """The group with what the rewards that compare siblings, and these alone, give each of them."""
        while True:
            try:
                return await self._on_one("compare", group, weight=len(group.rollouts))
            except (_LeftEarly, *LOST) as error:
                log.warning("a comparison is given to another worker: %s", error)

    async def _on_one(self, method: str, *args: Any, weight: int, **keywords: Any) -> RolloutGroup:
        worker = await self.dispatch.room(weight)
        try:
            if (life := self._lives.get(worker.name)) is None:
                raise _LeftEarly(f"{worker.name} has ended between being chosen and being asked")
            group = await life.actor.call(method, *args, **keywords)
            assert isinstance(group, RolloutGroup)
            return group
        except LOST as error:
            if life is not None and life.left:
                raise _LeftEarly(f"{worker.name} has left") from error
            self.lose(worker.name, error)
            raise
        finally:
            self.dispatch.end(worker, weight)
            if worker.state is WorkerState.DRAINING and not worker.in_flight:
                self.bell.ring()

    # --- how many ----------------------------------------------------------------------------------------------------

    async def resize(self, count: int) -> None:
        """Have `count` workers from now on, whatever waits; returns at once, `roster` says how far that has come.

        A surplus worker is given nothing more and ends with the last of what it has, or after `actors.drain_seconds`,
        when its problems begin again elsewhere.

        Raises:
            ConfigError: `count` is below `actors.min` or above `actors.max`.
        """
        self.roster.resize(count)
        self.follows_queue = False
        self._failed_starts = 0
        self.bell.ring()

    async def _keep(self) -> None:
        """Start what is missing, let go what is too much, give up where nobody has served for too long."""
        clock = asyncio.get_running_loop().time
        served_at, look_at = clock(), -math.inf
        patience = round(_FOLLOW_SECONDS / self.settings.watch_seconds)
        follower = QueueFollower(rollouts_per_worker=self.settings.max_rollouts, patience=patience)
        while True:
            if self.follows_queue and clock() >= look_at:
                self.roster.target = follower.look(self.roster, waiting=self.dispatch.num_waiting)
                look_at = clock() + self.settings.watch_seconds
            self._fill()
            for worker in self.roster.surplus:
                if worker.state is WorkerState.STARTING:
                    self.lose(worker.name, ActorError("it is no longer wanted"))
                    continue
                self.let_go(worker.name, f"{self.roster.target} are wanted")
            if self.roster.serving:
                served_at = clock()
            elif self.dispatch.num_waiting and (why := self._why_lost(clock() - served_at)) is not None:
                self.dispatch.fail(FleetLostError(why))
            await self.bell.heard(self.settings.watch_seconds)

    @property
    def has_given_up(self) -> bool:
        """Whether no worker is started any more until somebody scales, because one after another could not start."""
        return self._failed_starts >= _MAX_FAILED_STARTS

    def _fill(self) -> None:
        for _ in range(0 if self.has_given_up else self.roster.missing):
            actor = self._place(self.roster.num_joined)
            self._lives[actor.name] = WorkerLife(self.roster.joined(actor.name), actor, self)

    def _why_lost(self, seconds: float) -> str | None:
        last = f"; what happened last: {self.events[-1][1]}: {self.events[-1][2]}" if self.events else ""
        if self.has_given_up and not self.roster.staying:
            return f"{self._failed_starts} rollout workers in a row could not start and none is left{last}"
        if seconds < self.settings.wait_seconds:
            return None
        there = ", ".join(f"{count} {state}" for state, count in self.roster.counts.items()) or "none"
        return (
            f"no rollout worker has served for {seconds:.0f} s (actors.wait_seconds); of {self.roster.target} wanted "
            f"there are: {there}{last}"
        )

    # --- one worker's life -------------------------------------------------------------------------------------------

    async def make_ready(self, life: WorkerLife, backend: str) -> None:
        """Tell a worker whose engine answers which actors there are, and let it serve or wait for weights."""
        self.backend = backend
        told: dict[str, Sequence[Actor]] = {}
        while changed := {place: pool.actors for place, pool in self.pools.items() if told.get(place) != pool.actors}:
            for place, actors in changed.items():
                told[place] = list(actors)
                await life.actor.call("use_actors", place, actors, seconds=self.settings.answer_seconds)
        self._failed_starts = 0
        if life.worker.state is WorkerState.DRAINING:
            return
        self.roster.started(life.worker.name)
        self.note(life.worker.name, "has started")
        if not self.follows_learner and self.roster.version == self._first_version:
            await life.actor.call("resume", self._first_version, seconds=self.settings.sync_seconds)
            self.synced([life.worker.name], self._first_version)
        self.bell.ring()

    def let_go(self, name: str, why: str) -> None:
        """A worker is given nothing more, and ends with the last of what it has."""
        self.roster.draining(name)
        self.note(name, f"is to leave: {why}")
        self.bell.ring()

    def ended(self, life: WorkerLife) -> None:
        """A worker is no more: take it off the roster."""
        name = life.worker.name
        self._lives.pop(name, None)
        if life.worker.state is WorkerState.STARTING and life.failure is not None:
            if not isinstance(life.failure, ActorTimeoutError):  # else it may wait for a node: tried for ever
                self._failed_starts += 1
            self._start_failure = life.failure
        if name in self.roster.workers:
            self.roster.gone(name)
        self.note(name, "has left" if life.failure is None else f"is lost: {life.failure}")
        self.bell.ring()

    def lose(self, name: str, why: RlsysError) -> None:
        """Give a worker up at once: it is killed, its calls fail, and another one is started in its place."""
        life = self._lives.pop(name, None)
        if life is not None:
            self.roster.gone(name)
            life.kill(why)

    def note(self, name: str, what: str) -> None:
        """Remember what happened to whom, for people."""
        self.events.append((time.time(), name, what))
        log.info("%s %s", name, what)

    # --- all workers -------------------------------------------------------------------------------------------------

    def _in_state(self, *states: WorkerState) -> list[Actor]:
        return [self._lives[worker.name].actor for worker in self.roster.in_state(*states)]

    @property
    def actors(self) -> list[Actor]:
        """The workers that have started, in the order in which they joined."""
        return self._in_state(WorkerState.STALE, WorkerState.HEALTHY, WorkerState.DRAINING)

    def pulse_of(self, name: str) -> Mapping[str, float]:
        """The last answer of a worker to `pulse`; empty before the first."""
        return self._lives[name].pulse if name in self._lives else {}

    async def isolation(self) -> dict[str, str]:
        """The tier of every tool or reward that has one, as `isolation_NAME`; the weakest where hosts differ."""
        everyone = [*self.actors, *(actor for pool in self.pools.values() for actor in pool.actors)]
        found: dict[str, str] = {}
        for tiers in await asyncio.gather(*(actor.call("isolation") for actor in everyone)):
            for name, tier in tiers.items():
                found[f"isolation_{name}"] = min(tier, found.get(f"isolation_{name}", tier))
        return found

    async def use_actors(self, place: str, actors: Sequence[Actor]) -> None:
        """Tell every worker which actors host the plug-in at this place from now on."""
        for result in (await self.on(self.actors, "use_actors", place, actors)).values():
            if isinstance(result, RlsysError) and not isinstance(result, LOST):
                raise result

    async def call_all(self, method: str, *args: Any, seconds: float, **keywords: Any) -> list[Any]:
        """Call every worker side by side.

        Raises:
            ActorError: the first that failed.
        """
        found = await self.on(self.actors, method, *args, seconds=seconds, **keywords)
        for result in found.values():
            if isinstance(result, BaseException):
                raise result
        return list(found.values())

    async def on(
        self, actors: Iterable[Actor], method: str, *args: Any, seconds: float | None = None, **keywords: Any
    ) -> dict[str, Any]:
        """What a call to each of these workers gave, by name, or the error that it raised; one that died is lost."""
        limit = self.settings.sync_seconds if seconds is None else seconds
        chosen = list(actors)
        calls = (actor.call(method, *args, seconds=limit, **keywords) for actor in chosen)
        results = await asyncio.gather(*calls, return_exceptions=True)
        for actor, result in zip(chosen, results, strict=True):
            if isinstance(result, LOST):
                self.lose(actor.name, result)
            elif isinstance(result, BaseException) and not isinstance(result, RlsysError):
                raise result
        return {actor.name: result for actor, result in zip(chosen, results, strict=True)}

    # --- weights -----------------------------------------------------------------------------------------------------

    async def begin_at(self, version: int) -> None:
        """The model that the engines were started with is weights `version`; before any learner is followed."""
        await self.call_all("resume", version, seconds=self.settings.sync_seconds)
        self._first_version = version
        self.synced([worker.name for worker in self.roster.serving], version)

    @property
    def receivers(self) -> list[Actor]:
        """The workers that are to hold the learner's weights."""
        return self._in_state(WorkerState.STALE, WorkerState.HEALTHY)

    @property
    def newcomers(self) -> list[Actor]:
        """The workers that have started and hold no weights that may serve."""
        return self._in_state(WorkerState.STALE)

    def synced(self, names: Iterable[str], version: int) -> None:
        """These workers hold weights `version`, proved, and generate; those that leave anyway do not count."""
        members = {worker.name for worker in self.roster.in_state(WorkerState.STALE, WorkerState.HEALTHY)}
        self.roster.synced([name for name in names if name in members], version)
        self.dispatch.hand_out()
        self.bell.ring()

    def doubt(self, names: Sequence[str], why: str) -> None:
        """What these workers hold is not known: they get no work until they are synced."""
        self.roster.doubted(names)
        self.note(", ".join(names), f"weights did not arrive: {why}")
        self.bell.ring()


class _LeftEarly(ActorError):
    """A worker that was to leave has left before its work was done: nobody's failure."""


def _placed(config: Config, model_path: str, index: int) -> Actor:
    return cluster.place(
        resolve(config.actors.use, place="actors.use"),
        rollout_demand(config),
        [{"config": config, "model_path": model_path, "index": index}],
        call_seconds=config.cluster.call_seconds,
        concurrency=4096,
        first_index=index,
        cancels=True,  # nobody waits for what an ended loop had begun, and an engine has other things to write
    )[0]
