"""The training loop: synchronous and asynchronous in one, with a staleness bound that holds by construction.

A slot is taken when a group starts and given back only after weights that were trained on it are published. There are
`(max_staleness + 1) * groups_per_step` slots and groups are trained in the order in which they started, so ahead of any
group there are at most `max_staleness` whole batches: no group is trained by a policy that is more than `max_staleness`
versions newer than the one it began with. With `max_staleness = 0` this is the synchronous on-policy trainer.

New weights reach the engines while groups are being generated, which go on with them; or, where `at_groups` is set,
between groups only: then nothing starts from the end of a policy step until its weights are published, and they are
published when all that was being written has ended, so that each group is written by one version. Towards the last step
no group starts that could not be trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rlsys.errors import TrainingStalledError
from rlsys.ledger import Ledger
from rlsys.types import RolloutGroup

_LOOK_SECONDS = 1.0
"""How often a loop that waits for quiet looks whether anything is being written at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The parts of a loop, each a coroutine function so that a test can put in a fake. Problems are known by number."""

    act: Callable[[int, int], Awaitable[RolloutGroup]]
    """Given the number of a problem and of the attempt at it (from 1): roll it out."""
    learn: Callable[[int, Mapping[int, RolloutGroup]], Awaitable[None]]
    """Given the number of the policy step (from 1) and its groups by the numbers of their problems: train on them."""
    publish: Callable[[int], Awaitable[None]]
    """Given the number of the policy step that was trained last: let its weights write from now on."""
    drop_reason: Callable[[int, RolloutGroup], str | None]
    """Why the group of the problem with this number is not trained on, or None."""
    groups_per_step: int
    max_staleness: int
    max_skipped_groups: int
    at_groups: bool = False
    is_generating: Callable[[], bool] = lambda: True
    """Whether any group that has started is being written; not where all of them wait for something to write them."""

    async def run(self, ledger: Ledger, numbers: Iterator[int], *, steps: int, stop: asyncio.Event) -> None:
        """Train up to policy step `steps`: first what `ledger` has not settled, then the problems of `numbers`.

        `stop` ends the loop after the step that is being learned. What is not settled at the end, however it comes,
        stands in the ledger as such.

        Raises:
            TrainingStalledError: `max_skipped_groups` groups in a row were of no use, or the problems ran out.
        """
        window = _Window(self.act, ledger, itertools.chain(ledger.unsettled, numbers))
        stopping = asyncio.create_task(window.wake_at(stop))
        try:
            while ledger.step < steps and not stop.is_set():
                groups = await self._collect(window, ledger, steps, stop)
                if groups is None:
                    break
                step = ledger.step + 1
                await self.learn(step, groups)
                ledger.train(groups, step)
                if self.at_groups:
                    await window.quiet(stop, self.is_generating)
                await self.publish(step)
                window.release(len(groups))
        finally:
            stopping.cancel()
            await asyncio.gather(window.cancel(), stopping, return_exceptions=True)

    async def _collect(
        self, window: _Window, ledger: Ledger, steps: int, stop: asyncio.Event
    ) -> dict[int, RolloutGroup] | None:
        """The next batch, in start order, or None where `stop` was set; a dropped group gives its slot to another."""
        slots = min(self.max_staleness + 1, steps - ledger.step) * self.groups_per_step
        groups: dict[int, RolloutGroup] = {}
        skipped = 0
        while len(groups) < self.groups_per_step:
            window.fill(slots)
            found = await window.next(stop)
            if found is None:
                return None
            number, group = found
            fault = self._fault(group, ledger.step)
            reason = fault or self.drop_reason(number, group)
            if reason is None:
                groups[number] = group
                skipped = 0
                continue
            if fault is None:
                ledger.drop(number, reason)
                window.release(1)
            else:
                ledger.discard(number, fault)
                window.again(number)
            skipped += 1
            if skipped >= self.max_skipped_groups:
                raise TrainingStalledError(
                    f"{skipped} groups in a row gave nothing to learn from (last reason: {reason}; all so far: "
                    f"{dict(ledger.dropped + ledger.discarded)}). Use problems that the policy solves sometimes but "
                    "not always, a larger rl.group_size, or rl.skip_uninformative=false"
                )
        return groups

    def _fault(self, group: RolloutGroup, version: int) -> str | None:
        """What no group has that began in this loop: weights that the learner does not know, or too old ones."""
        if any(int(rollout.versions.max(initial=-1)) > version for rollout in group.rollouts):
            return "newer_than_the_policy"
        oldest = min(
            (rollout.first_version for rollout in group.rollouts if rollout.num_trained_tokens), default=version
        )
        return "too_stale" if version - oldest > self.max_staleness else None


class _Window:
    """The groups that hold a slot: those that are being generated and those that wait to be collected."""

    def __init__(
        self, act: Callable[[int, int], Awaitable[RolloutGroup]], ledger: Ledger, numbers: Iterable[int]
    ) -> None:
        self._act, self._ledger, self._numbers = act, ledger, iter(numbers)
        self._held = 0
        self._order: deque[int] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived: dict[int, RolloutGroup] = {}
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def fill(self, slots: int) -> None:
        """Start groups until `slots` are held or the problems run out."""
        while self._held < slots and (number := next(self._numbers, None)) is not None:
            self._held += 1
            self._order.append(number)
            self._start(number)

    def again(self, number: int) -> None:
        """Start one once more, which keeps its slot and its place."""
        self._order.appendleft(number)
        self._start(number)

    def release(self, count: int) -> None:
        """Give slots back."""
        self._held -= count

    async def next(self, stop: asyncio.Event) -> tuple[int, RolloutGroup] | None:
        """The group that started first, with its problem's number; None once `stop` is set.

        Raises what any group raised, rather than to wait longer.
        """
        while not stop.is_set():
            if not self._order:
                raise TrainingStalledError(
                    f"the problems ran out after {self._ledger.issued}; a source must not be empty"
                )
            if self._order[0] in self._arrived:
                number = self._order.popleft()
                return number, self._arrived.pop(number)
            await self._change()
        return None

    async def quiet(self, stop: asyncio.Event, is_generating: Callable[[], bool]) -> None:
        """Return when nothing is being generated; what still is when `stop` is set is cancelled."""
        while self._tasks and is_generating() and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):  # `wait_for` may begin to listen a turn too late
                    await self._change()
        if stop.is_set():
            await self.cancel()

    async def cancel(self) -> None:
        """End what is being generated."""
        ended, self._tasks = self._tasks, set()
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)

    async def wake_at(self, stop: asyncio.Event) -> None:
        """Let nobody wait here any more once `stop` is set."""
        await stop.wait()
        self._changed.set()

    async def _change(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._changed.clear()
        await self._changed.wait()

    def _start(self, number: int) -> None:
        task = asyncio.create_task(self._roll_out(number, self._ledger.issue(number)))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _roll_out(self, number: int, attempt: int) -> None:
        group = await self._act(number, attempt)
        if self._ledger.deliver(number, attempt):
            self._arrived[number] = group

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks:  # not one that was cancelled from here
            self._tasks.remove(task)
            lost = RuntimeError("a group was cancelled by what rolls it out") if task.cancelled() else task.exception()
            self._failure = self._failure or lost
        self._changed.set()
