"""The training loop: synchronous and asynchronous in one, with a staleness bound that holds by construction.

A slot is taken when a group starts and given back only after weights that were trained on it are published. There are
`(max_staleness + 1) * groups_per_step` slots and groups are trained in the order in which they started, so ahead of any
group there are at most `max_staleness` whole batches: no group is trained by a policy that is more than `max_staleness`
versions newer than the one it began with. With `max_staleness = 0` this is the synchronous on-policy trainer.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rlsys.errors import TrainingStalledError
from rlsys.types import Problem, RolloutGroup


@dataclass(slots=True)
class LoopState:
    """What the loop has done: policy steps, problems whose fate is known (in stream order), and the drops by reason."""

    step: int = 0
    cursor: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The parts of a loop, each a coroutine function so that a test can put in a fake."""

    act: Callable[[Problem], Awaitable[RolloutGroup]]
    """Roll out one problem."""
    learn: Callable[[int, list[RolloutGroup], Mapping[str, int]], Awaitable[None]]
    """Given the step number (from 1), its groups and the new drops: train on them and publish the new weights."""
    drop_reason: Callable[[RolloutGroup], str | None]
    """Why a group is not trained on, or None."""
    groups_per_step: int
    max_staleness: int
    max_skipped_groups: int

    async def run(self, problems: Iterator[Problem], *, steps: int, state: LoopState, stop: asyncio.Event) -> LoopState:
        """Train up to policy step `steps`; `stop` ends the loop after the step that is being learned.

        Raises:
            TrainingStalledError: `max_skipped_groups` groups in a row were dropped, or the problems ran out.
        """
        slots = asyncio.Semaphore((self.max_staleness + 1) * self.groups_per_step)
        started: deque[asyncio.Task[RolloutGroup]] = deque()
        arrived = asyncio.Event()
        producer = asyncio.create_task(self._start_groups(problems, slots, started, arrived))
        stopping = asyncio.create_task(stop.wait())
        try:
            while state.step < steps and not stop.is_set():
                cursor, before = state.cursor, state.dropped.copy()
                collecting = asyncio.create_task(self._collect(started, arrived, producer, slots, state))
                await asyncio.wait({collecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not collecting.done():
                    await _cancel(collecting)
                    # What was collected is not learned from, so its problems come again when the run goes on.
                    state.cursor, state.dropped = cursor, before
                    break
                groups = collecting.result()
                await self.learn(state.step + 1, groups, state.dropped - before)
                state.step += 1
                for _ in groups:
                    slots.release()
        finally:
            await _cancel(producer, stopping, *started)
        return state

    async def _start_groups(
        self,
        problems: Iterator[Problem],
        slots: asyncio.Semaphore,
        started: deque[asyncio.Task[RolloutGroup]],
        arrived: asyncio.Event,
    ) -> None:
        try:
            for problem in problems:
                await slots.acquire()
                started.append(asyncio.create_task(_awaited(self.act(problem))))
                arrived.set()
        finally:
            arrived.set()

    async def _collect(
        self,
        started: deque[asyncio.Task[RolloutGroup]],
        arrived: asyncio.Event,
        producer: asyncio.Task[None],
        slots: asyncio.Semaphore,
        state: LoopState,
    ) -> list[RolloutGroup]:
        """The next batch, in start order; dropped groups give their slot back at once."""
        groups: list[RolloutGroup] = []
        skipped = 0
        while len(groups) < self.groups_per_step:
            while not started:
                if producer.done():
                    producer.result()
                    raise TrainingStalledError(f"the problems ran out after {state.cursor}; a source must not be empty")
                arrived.clear()
                await arrived.wait()
            group = await started[0]
            started.popleft()
            state.cursor += 1
            reason = self.drop_reason(group)
            if reason is None:
                groups.append(group)
                skipped = 0
                continue
            state.dropped[reason] += 1
            slots.release()
            skipped += 1
            if skipped >= self.max_skipped_groups:
                raise TrainingStalledError(
                    f"{skipped} groups in a row gave nothing to learn from (last reason: {reason}; all so far: "
                    f"{dict(state.dropped)}). Use problems that the policy solves sometimes but not always, a larger "
                    "rl.group_size, or rl.skip_uninformative=false"
                )
        return groups


async def _awaited(awaitable: Awaitable[RolloutGroup]) -> RolloutGroup:
    return await awaitable


async def _cancel(*tasks: asyncio.Task[object] | asyncio.Task[RolloutGroup] | asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
