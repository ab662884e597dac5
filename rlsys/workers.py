"""The rollout workers of a run as a pure state machine: who is there, who may be given work, how many there should be.

A worker is STARTING until its engine answers, STALE until it holds the learner's published weights, HEALTHY while it
does, DRAINING when it is to leave and finishes what it has, GONE for ever after. A worker that is replaced comes back
under another name. Nothing here waits, calls or reads a clock.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from rlsys.errors import ConfigError


class WorkerState(StrEnum):
    """Where a worker is between its beginning and its end."""

    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    DRAINING = "draining"
    GONE = "gone"


_NEXT = {
    WorkerState.STARTING: {WorkerState.STALE, WorkerState.DRAINING, WorkerState.GONE},
    WorkerState.STALE: {WorkerState.HEALTHY, WorkerState.DRAINING, WorkerState.GONE},
    WorkerState.HEALTHY: {WorkerState.HEALTHY, WorkerState.STALE, WorkerState.DRAINING, WorkerState.GONE},
    WorkerState.DRAINING: {WorkerState.GONE},
    WorkerState.GONE: set(),
}


@dataclass(slots=True)
class Worker:
    """One rollout worker as the driver knows it."""

    name: str
    number: int
    """Counts from 0 over the whole run."""
    state: WorkerState = WorkerState.STARTING
    version: int = -1
    """Of the weights that it holds; -1 before it holds any that were published."""
    in_flight: int = 0
    """Rollouts."""


class Roster:
    """All workers of a fleet, and how many it aims at.

    Methods named after events change it and raise ValueError where an event cannot happen in a worker's state.
    """

    def __init__(self, *, target: int, minimum: int = 1, maximum: int | None = None, capacity: int) -> None:
        self.minimum, self.maximum, self.capacity = minimum, maximum, capacity
        self.target = target
        """Workers that there should be, those that drain not counted."""
        self.version = 0
        """Of the weights that a worker must hold to be HEALTHY."""
        self.workers: dict[str, Worker] = {}
        """Those that are not GONE, in the order in which they joined."""
        self.num_joined = 0
        self._free: list[tuple[int, int, str]] = []  # a heap; entries that no longer hold are passed over

    # --- events ------------------------------------------------------------------------------------------------------

    def resize(self, count: int) -> None:
        """Aim at `count` workers from now on.

        Raises:
            ConfigError: it lies outside of `minimum` and `maximum`.
        """
        if count < self.minimum:
            raise ConfigError(f"{count} rollout workers are fewer than actors.min ({self.minimum})")
        if self.maximum is not None and count > self.maximum:
            raise ConfigError(f"{count} rollout workers are more than actors.max ({self.maximum})")
        self.target = count

    def joined(self, name: str) -> Worker:
        """A new worker is being started."""
        if name in self.workers:
            raise ValueError(f"{name} is here already")
        worker = self.workers[name] = Worker(name, self.num_joined)
        self.num_joined += 1
        return worker

    def started(self, name: str) -> None:
        """Its engine answers; it holds no weights that were proved."""
        self._move(self.workers[name], WorkerState.STALE)

    def synced(self, names: Iterable[str], version: int) -> None:
        """These hold weights `version`, proved; who serves older ones is STALE from now on."""
        if version < self.version:
            raise ValueError(f"weights {version} are older than those that were published, {self.version}")
        self.version = version
        for name in names:
            worker = self.workers[name]
            self._move(worker, WorkerState.HEALTHY)
            worker.version = version
            self._offer(worker)
        for worker in self.workers.values():
            if worker.state is WorkerState.HEALTHY and worker.version != version:
                self._move(worker, WorkerState.STALE)

    def restored(self, version: int) -> None:
        """The learner has gone back to `version`: whatever workers hold, nobody is to be given work with it."""
        self.doubted(worker.name for worker in self.workers.values() if worker.state is WorkerState.HEALTHY)
        self.version = version

    def doubted(self, names: Iterable[str]) -> None:
        """What these hold is not known, as after a transfer that failed: STALE."""
        for name in list(names):
            if name in self.workers and self.workers[name].state is WorkerState.HEALTHY:
                self._move(self.workers[name], WorkerState.STALE)

    def draining(self, name: str) -> None:
        """It is to leave: no new work."""
        self._move(self.workers[name], WorkerState.DRAINING)

    def gone(self, name: str) -> None:
        """It has left or died; what it had in flight is another's now."""
        worker = self.workers.pop(name)
        self._move(worker, WorkerState.GONE)

    def _move(self, worker: Worker, state: WorkerState) -> None:
        if state not in _NEXT[worker.state]:
            raise ValueError(f"{worker.name} is {worker.state} and cannot become {state}")
        worker.state = state

    # --- work --------------------------------------------------------------------------------------------------------

    def take(self, size: int) -> Worker | None:
        """The HEALTHY worker with the fewest rollouts in flight, which now has `size` more.

        None where all are full. A worker carries `capacity` rollouts at most, or one larger group alone.
        """
        while self._free:
            in_flight, _, name = self._free[0]
            worker = self.workers.get(name)
            if worker is None or worker.state is not WorkerState.HEALTHY or worker.in_flight != in_flight:
                heapq.heappop(self._free)
                continue
            if in_flight and in_flight + size > self.capacity:
                return None
            heapq.heappop(self._free)
            worker.in_flight += size
            self._offer(worker)
            return worker
        return None

    def give_back(self, worker: Worker, size: int) -> None:
        """`size` rollouts of a worker have ended, one way or another."""
        worker.in_flight -= size
        if worker.in_flight < 0:
            raise ValueError(f"{worker.name} gave back more rollouts than it had")
        if worker.state is WorkerState.HEALTHY:
            self._offer(worker)

    def _offer(self, worker: Worker) -> None:
        if len(self._free) > 64 + 4 * len(self.workers):  # mostly entries that no longer hold
            self._free = [(one.in_flight, one.number, one.name) for one in self.serving]
            heapq.heapify(self._free)
        heapq.heappush(self._free, (worker.in_flight, worker.number, worker.name))

    # --- answers -----------------------------------------------------------------------------------------------------

    def in_state(self, *states: WorkerState) -> list[Worker]:
        """The workers in one of these states, in the order in which they joined."""
        return [worker for worker in self.workers.values() if worker.state in states]

    @property
    def serving(self) -> list[Worker]:
        """Those that may be given work."""
        return self.in_state(WorkerState.HEALTHY)

    @property
    def staying(self) -> list[Worker]:
        """Those that count towards the target."""
        return self.in_state(WorkerState.STARTING, WorkerState.STALE, WorkerState.HEALTHY)

    @property
    def missing(self) -> int:
        """How many workers are to be started."""
        return max(0, self.target - len(self.staying))

    @property
    def surplus(self) -> list[Worker]:
        """Those that are to leave: the least useful states first, then the fewest rollouts, then the youngest."""
        usefulness = [WorkerState.STARTING, WorkerState.STALE, WorkerState.HEALTHY]
        order = sorted(self.staying, key=lambda one: (usefulness.index(one.state), one.in_flight, -one.number))
        return order[: max(0, len(order) - self.target)]

    @property
    def counts(self) -> Counter[WorkerState]:
        """Workers by state."""
        return Counter(worker.state for worker in self.workers.values())


class QueueFollower:
    """How many workers the work at hand needs, for a fleet that grows and shrinks by itself.

    Grows at once. Shrinks to the most that was needed in the last `patience` looks, because between two policy steps of
    a synchronous run nothing is in flight.
    """

    def __init__(self, *, rollouts_per_worker: int, patience: int) -> None:
        self._per_worker = rollouts_per_worker
        self._needed: deque[int] = deque(maxlen=max(1, patience))

    def look(self, roster: Roster, *, waiting: int) -> int:
        """The number to aim at, with `waiting` rollouts that no worker has room for."""
        at_work = sum(worker.in_flight for worker in roster.workers.values())
        self._needed.append(math.ceil((at_work + waiting) / self._per_worker))
        most = max(self._needed) if len(self._needed) == self._needed.maxlen else max(roster.target, *self._needed)
        highest = roster.maximum if roster.maximum is not None else roster.target
        return min(max(most, roster.minimum), highest)
