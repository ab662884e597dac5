"""New weights from the learner ranks to every rollout worker, proved; workers may die, hang or join meanwhile.

Learner and workers meet as a group that has an epoch. A group cannot change: when other workers are to have weights, or
a transfer has failed, they meet anew under the next epoch, without the dead. Where the learner shares its memory, a
worker that joins on its host reads there what was published last, by itself, while the learner trains on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from rlsys.cluster import Actor
from rlsys.config import ActorsConfig
from rlsys.errors import (
    ActorDiedError,
    ActorError,
    ActorTimeoutError,
    FleetLostError,
    LearnerLostError,
    RlsysError,
    WeightSyncError,
)
from rlsys.fleet import RolloutFleet
from rlsys.shared_weights import SharedPlace
from rlsys.weights import WeightGroup, WeightPlan, verify
from rlsys.worker_life import LOST

log = logging.getLogger(__name__)

_TRIES = 3
"""So often may weights not arrive, of a publication or at a newcomer, before that is an error."""
_Call = tuple[Actor, str, tuple[Any, ...], dict[str, Any]]
_GRACE_SECONDS = 15.0
"""So much later than the transfer itself gives up, it is given up from outside."""


class Publisher(Protocol):
    """What is known of a learner that publishes."""

    is_ahead: bool
    at_rest: asyncio.Lock


class WeightSync:
    """The transfers from one learner to one fleet."""

    def __init__(self, ranks: Sequence[Actor], plan: WeightPlan, fleet: RolloutFleet, settings: ActorsConfig) -> None:
        self._ranks, self._plan, self._fleet, self._settings = ranks, plan, fleet, settings
        self.epoch = 0
        """How often learner and workers have met."""
        self.num_failures = 0
        """Transfers that failed for at least one worker."""
        self._members: tuple[str, ...] = ()
        self._alone = asyncio.Lock()
        self._shared: tuple[int, SharedPlace, Mapping[str, int]] | None = None
        self._cannot_read: set[str] = set()

    async def publish(self, choose: Callable[[], Sequence[Actor]], version: int) -> dict[str, float]:
        """Pause the workers that `choose` names, give them the weights, let them go on as `version`.

        Where it fails it is tried again without those who died, and whoever has not proved the weights is STALE and
        frozen. Returns the seconds: `pause`, `transfer`, `total`.

        Raises:
            WeightSyncError, ActorError: it failed again and again, and not because workers died one after another.
            FleetLostError: no worker came for `actors.wait_seconds`.
            LearnerLostError: a rank died or hangs.
        """
        there = {worker.name for worker in choose()}
        failures = 0
        while True:
            try:
                return await self.give(await self._some(choose), version)
            except (ActorError, WeightSyncError) as error:
                left = {worker.name for worker in choose()} & there
                failures += left == there  # each of the first workers may die once, those in their place may not
                there = left
                if failures == _TRIES:
                    raise
                log.warning("weights %d did not arrive and are sent again: %s", version, error)

    async def _some(self, choose: Callable[[], Sequence[Actor]]) -> Sequence[Actor]:
        clock, patience = asyncio.get_running_loop().time, self._settings.wait_seconds
        until = clock() + patience
        while not (workers := choose()):
            if clock() >= until:
                raise FleetLostError(f"no rollout worker came to take new weights for {patience:g} s (wait_seconds)")
            await self._fleet.bell.heard(until - clock())
        return workers

    async def give(self, workers: Sequence[Actor], version: int) -> dict[str, float]:
        """As `publish`, to these and once."""
        async with self._alone:
            return await self._give(workers, version)

    async def _give(self, workers: Sequence[Actor], version: int) -> dict[str, float]:
        self._shared = None
        fleet, started = self._fleet, time.perf_counter()
        fleet.frozen = True
        try:
            _raise_first((await fleet.on(workers, "pause")).values())
            paused = time.perf_counter()
            sums = await self._transfer(workers, version)
            moved = time.perf_counter()
            resumed = await fleet.on(workers, "resume", version)
            fleet.synced([name for name, result in resumed.items() if result is None], version)
            _raise_first(result for result in resumed.values() if not isinstance(result, LOST))
        except (ActorError, WeightSyncError) as error:
            self.num_failures += 1
            self._members = ()
            fleet.doubt([worker.name for worker in workers], str(error))
            raise
        finally:
            fleet.frozen = False
        ended = time.perf_counter()
        [place], _ = await self._exchange([], [(self._ranks[0], "published_weights", (), {})], [])
        self._shared = None if place is None else (version, place, sums)
        return {"pause": paused - started, "transfer": moved - paused, "total": ended - started}

    def readers(self, workers: Sequence[Actor]) -> list[Actor]:
        """Those of these workers that may find the published weights in the learner's memory."""
        if self._shared is None or self._shared[0] != self._fleet.roster.version:
            return []
        return [worker for worker in workers if worker.name not in self._cannot_read]

    async def let_read(self) -> None:
        """Let workers that joined read what was published last; the learner takes no part.

        A worker that cannot, as on another host, is not one of `readers` again.
        """
        fleet = self._fleet
        async with self._alone:
            workers = self.readers(fleet.newcomers)  # meanwhile others may have been published
            if self._shared is None or not workers:
                return
            version, place, sums = self._shared
            paused = await fleet.on(workers, "pause")
            found = await fleet.on(
                [worker for worker in workers if paused[worker.name] is None],
                "receive_weights",
                self._plan,
                published=place,
            )
            for worker in workers:
                try:
                    _raise_first([found.get(worker.name, paused[worker.name])])
                    verify(sums, {worker.name: found[worker.name]}, version=version)
                    _raise_first((await fleet.on([worker], "resume", version)).values())
                except RlsysError as error:
                    self._cannot_read.add(worker.name)
                    log.info("%s gets its weights by another way: %s", worker.name, error)
                else:
                    fleet.synced([worker.name], version)

    async def _transfer(self, workers: Sequence[Actor], version: int) -> Mapping[str, int]:
        if tuple(worker.name for worker in workers) != self._members:
            await self._meet(workers)
        sent, received = await self._exchange(
            workers,
            [(rank, "send_weights", (), {}) for rank in self._ranks],
            [(worker, "receive_weights", (self._plan,), {}) for worker in workers],
        )
        if sent[0].keys() != set(self._plan.names):
            raise WeightSyncError("the learner did not send all tensors of its plan")
        sums = {worker.name: result for worker, result in zip(workers, received, strict=True)}
        verify(sent[0], sums, version=version)
        return dict(sent[0])

    async def _meet(self, workers: Sequence[Actor]) -> None:
        """Let the learner and these workers meet as a group, under a new epoch.

        Raises:
            ActorError: a worker cannot.
            LearnerLostError: a rank died or hangs.
        """
        self._members = ()
        self.epoch += 1
        seconds = self._settings.sync_seconds
        [place], _ = await self._exchange([], [(self._ranks[0], "rendezvous", (), {})], [])
        # A tensor-parallel engine has several processes; each is a rank of the group.
        each = max(1, int(self._settings.gpus))
        group = WeightGroup(master_address=place[0], master_port=place[1], world_size=1 + each * len(workers))
        options = {"backend": self._fleet.backend, "timeout": seconds}
        await self._exchange(
            workers,
            [(rank, "open_weights", (group,), options) for rank in self._ranks],
            [(one, "open_weights", (group,), {"rank": 1 + each * index}) for index, one in enumerate(workers)],
        )
        self._members = tuple(worker.name for worker in workers)

    async def _exchange(
        self, workers: Sequence[Actor], to_ranks: Sequence[_Call], to_workers: Sequence[_Call]
    ) -> tuple[list[Any], list[Any]]:
        """What ranks and workers answer to calls that need one another.

        Where one fails, the learner leaves the group, so that the others do not wait there for nothing.
        """
        seconds = self._settings.sync_seconds + _GRACE_SECONDS
        tasks = [
            asyncio.create_task(actor.call(method, *arguments, seconds=seconds, **keywords))
            for actor, method, arguments, keywords in (*to_ranks, *to_workers)
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() is not None for task in tasks):
            leaving = self._ranks[0].call("leave_weights", seconds=seconds)
            await asyncio.gather(leaving, *tasks, return_exceptions=True)
        from_ranks = [task.exception() or task.result() for task in tasks[: len(to_ranks)]]
        from_workers = [task.exception() or task.result() for task in tasks[len(to_ranks) :]]
        for result in from_ranks:
            if isinstance(result, ActorDiedError | ActorTimeoutError):
                raise LearnerLostError(f"the learner cannot publish: {result}") from result
        for worker, result in zip(workers, from_workers, strict=True):
            if isinstance(result, LOST):
                self._fleet.lose(worker.name, result)
        _raise_first((*from_workers, *from_ranks))
        return from_ranks, from_workers


def _raise_first(results: Iterable[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def serve_newcomers(sync: WeightSync, fleet: RolloutFleet, learner: Publisher) -> None:
    """For ever: give the published weights to workers that join.

    Those that cannot read them by themselves wait until the learner is at rest and has no others.
    """
    failed: Counter[str] = Counter()
    while True:
        while not fleet.newcomers or (learner.is_ahead and not sync.readers(fleet.newcomers)):
            await fleet.bell.heard()
        if sync.readers(fleet.newcomers):
            await sync.let_read()
            continue
        async with learner.at_rest:
            workers = fleet.newcomers
            if learner.is_ahead or not workers:
                continue
            try:
                await sync.give(workers, fleet.roster.version)
            except RlsysError as error:
                log.warning("workers that joined did not get their weights: %s", error)
                failed.update(worker.name for worker in workers)
                for worker in workers:
                    if failed[worker.name] >= _TRIES:
                        fleet.lose(worker.name, error)
