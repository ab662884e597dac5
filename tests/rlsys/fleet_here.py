"""Rollout workers and learner ranks in this process, for tests of the fleet: they do what a test tells them to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rlsys.config import ActorsConfig, SamplingConfig
from rlsys.errors import ActorDiedError, ActorTimeoutError
from rlsys.fleet import RolloutFleet
from rlsys.types import Problem, RolloutGroup

SETTINGS = ActorsConfig(
    count=2,
    max_rollouts=4,
    watch_seconds=0.02,
    answer_seconds=0.2,
    stall_seconds=0.2,
    drain_seconds=0.5,
    wait_seconds=0.5,
    sync_seconds=1.0,
    start_seconds=1.0,
)


@dataclass
class FakeWorker:
    """Looks like `rlsys.cluster.Actor`; `does[METHOD]` is what it does in the place of answering at once."""

    number: int
    does: dict[str, Callable[..., Awaitable[Any]]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    groups: list[str] = field(default_factory=list)
    version: int = -1
    tokens: float = 0.0
    running: int = 0
    most_running: int = 0
    dead: bool = False
    closed: bool = False
    seconds: float = 0.0
    """How long a group takes."""
    _deaths: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"rollout actor {self.number}"

    async def call(self, method: str, *args: Any, seconds: float | None = None, **keywords: Any) -> Any:
        """As an actor answers: dies when it is killed, and is given up after `seconds`."""
        self.calls[method] += 1
        if self.dead:
            raise ActorDiedError(f"{self.name} died during {method}")
        death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deaths.append(death)
        work = asyncio.ensure_future(self.does.get(method, getattr(self, f"on_{method}"))(*args, **keywords))
        try:
            await asyncio.wait({work, death}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                raise ActorDiedError(f"{self.name} died during {method}")
            if not work.done():
                raise ActorTimeoutError(f"{self.name}.{method} did not answer within {seconds} s")
            return work.result()
        finally:
            self._deaths.remove(death)
            work.cancel()

    def kill(self, *, restart: bool = False) -> None:  # noqa: ARG002
        self.dead = True
        for death in self._deaths:
            if not death.done():
                death.set_result(None)

    async def on_start(self) -> str:
        return "fake"

    async def on_pulse(self) -> dict[str, float]:
        self.tokens += self.running
        return {"tokens": self.tokens, "running": float(self.running)}

    async def on_act(self, problem: Problem, *, size: int, group_id: str, **_: Any) -> RolloutGroup:
        self.groups.append(group_id)
        self.running += size
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= size
        return RolloutGroup(problem=problem, rollouts=())

    async def on_compare(self, group: RolloutGroup) -> RolloutGroup:
        return group

    async def on_use_actors(self, *_: Any) -> None:
        return None

    async def on_isolation(self) -> dict[str, str]:
        return {}

    async def on_pause(self) -> None:
        return None

    async def on_resume(self, version: int) -> None:
        self.version = version

    async def on_open_weights(self, *_: Any, **__: Any) -> None:
        return None

    async def on_receive_weights(self, plan: Any, *, published: Any = None) -> dict[str, int]:  # noqa: ARG002
        return dict.fromkeys(plan.names, 7)

    async def on_close(self) -> None:
        self.closed = True


class FakeFleet(RolloutFleet):
    """A real fleet of fake workers, each of which `prepare` may change before it starts."""

    def __init__(self, prepare: Callable[[FakeWorker], None] = lambda _: None, **settings: Any) -> None:
        self.fakes: list[FakeWorker] = []
        self._prepare = prepare
        super().__init__(replace(SETTINGS, **settings), self._make)  # type: ignore[arg-type]

    def _make(self, number: int) -> FakeWorker:
        worker = FakeWorker(number)
        self._prepare(worker)
        self.fakes.append(worker)
        return worker

    async def roll(self, number: int = 0, size: int = 1) -> RolloutGroup:
        """Act on one problem."""
        problem = Problem(id=str(number), prompt=({"role": "user", "content": "?"},))
        return await self.act(problem, size=size, sampling=SamplingConfig(), group_id=f"g{number}")

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Return when it holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)


async def never(*_: Any, **__: Any) -> None:
    """What a worker that hangs does."""
    await asyncio.Event().wait()


def running(fleet: FakeFleet, test: Callable[[], Awaitable[None]], *, seconds: float = 30.0) -> None:
    """Start the fleet, run the test, end the fleet, and see that no task is left behind."""

    async def main() -> None:
        before = asyncio.all_tasks()
        async with asyncio.timeout(seconds):
            await fleet.started()
            try:
                await test()
            finally:
                await fleet.close()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - before
        assert not left, f"left behind: {left}"

    asyncio.run(main())
