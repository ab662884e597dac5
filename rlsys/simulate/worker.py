"""A rollout worker in virtual time: to the fleet an actor like any other, but nothing is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsys.cluster import Actor
from rlsys.config import SamplingConfig
from rlsys.errors import ActorDiedError, ActorTimeoutError
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.engine import EngineModel
from rlsys.simulate.sizes import Draw, Size
from rlsys.types import Problem, Rollout, RolloutGroup

_SECONDS_PER_HOUR = 3600.0


@dataclass(slots=True)
class Sums:
    """What the engines of all workers have done, those that have died included."""

    tokens: float = 0.0
    """Written."""
    busy_seconds: float = 0.0
    """Engine time in which something was generated."""
    rollout_seconds: float = 0.0
    """Rollouts times the seconds for which they were generated."""
    engine_seconds: float = 0.0
    """Engine time, from the first answer to the end."""


class Process(Actor):
    """An actor without a process: its methods run on the event loop of their caller, and fail where it is killed."""

    def __init__(self, name: str, *, call_seconds: float) -> None:
        super().__init__(name, None, call_seconds=call_seconds)
        self._calls: set[tuple[asyncio.Task[Any], asyncio.Future[Any], str]] = set()
        self.dead = False
        self.hangs = False

    async def call(self, method: str, *args: Any, seconds: float | None = None, **keywords: Any) -> Any:
        """Call a method and await its result.

        Raises:
            ActorDiedError: it has ended.
            ActorTimeoutError: it did not answer within `seconds`.
        """
        if self.dead:
            raise ActorDiedError(f"{self.name} died before {method}")
        limit = self._call_seconds if seconds is None else seconds
        answer = asyncio.get_running_loop().create_future()
        work: Coroutine[Any, Any, Any] = getattr(self, method)(*args, **keywords)
        task = asyncio.create_task(self._answered(work, answer))
        entry = (task, answer, method)
        self._calls.add(entry)
        try:
            return await asyncio.wait_for(answer, limit)
        except TimeoutError as error:
            raise ActorTimeoutError(f"{self.name}.{method} did not answer within {limit:g} s") from error
        finally:
            self._calls.discard(entry)
            task.cancel()

    async def _answered(self, work: Coroutine[Any, Any, Any], answer: asyncio.Future[Any]) -> None:
        try:
            found = await work
        except Exception as error:  # it is the caller's, as it would be over the wire
            if not answer.done():
                answer.set_exception(error)
            return
        if not answer.done() and not self.hangs:
            answer.set_result(found)

    def kill(self, *, restart: bool = False) -> None:  # noqa: ARG002
        """End it now: open calls fail."""
        self.dead = True
        for task, answer, method in list(self._calls):
            task.cancel()
            if not answer.done():
                answer.set_exception(ActorDiedError(f"{self.name} died during {method}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all simulated workers of a run share."""

    model: SimulateConfig
    max_rollouts: int
    call_seconds: float
    seed: int
    draw: Draw


class SimulatedWorker(Process):
    """One engine; its rollouts take the time of their tokens, their tool calls and their grading."""

    def __init__(self, index: int, around: Surroundings) -> None:
        super().__init__(f"rollout actor {index}", call_seconds=around.call_seconds)
        self._around, self._model = around, around.model
        self._random = np.random.default_rng([around.seed, 1 << 32, index])
        self._fate: asyncio.TimerHandle | None = None
        self.engine: EngineModel | None = None

    # --- what the fleet calls ----------------------------------------------------------------------------------------

    async def start(self) -> str:
        """The engine loads; from then on the worker may die."""
        await asyncio.sleep(self._model.start_seconds)
        self.engine = EngineModel(
            seconds=self._model.decode_seconds,
            seconds_per_rollout=self._model.decode_seconds_per_rollout,
            prefill=self._model.prefill_tokens_per_second,
            max_running=self._around.max_rollouts,
        )
        if self._model.hours_between_deaths is not None:
            seconds = self._random.exponential(self._model.hours_between_deaths * _SECONDS_PER_HOUR)
            silent = self._random.random() < self._model.hang_share
            self._fate = asyncio.get_running_loop().call_later(seconds, self._hang if silent else self.kill)
        return "simulated"

    async def act(self, problem: Problem, *, size: int, sampling: SamplingConfig, **_: Any) -> RolloutGroup:
        """A group whose rollouts hold no text: the first and the last version of each, and its length as a metric."""
        number = int(problem.id)
        sizes = self._around.draw(number, size)
        rollouts = await asyncio.gather(
            *(
                self._rollout(one, sibling, sampling.max_response_tokens, uninformative=problem.metadata["dull"])
                for sibling, one in enumerate(sizes)
            )
        )
        return RolloutGroup(problem=problem, rollouts=tuple(rollouts))

    async def pause(self) -> None:
        """Freeze generation."""
        self._alive.pause()

    async def resume(self, version: int) -> None:
        """Go on with these weights."""
        self._alive.resume(version)

    async def open_weights(self, *_: Any, **__: Any) -> None:
        """Meet the learner; the time is part of publishing."""

    async def receive_weights(self, plan: Any, **_: Any) -> dict[str, int]:
        """The weights come over the network."""
        await asyncio.sleep(self._model.transfer_seconds)
        return dict.fromkeys(plan.names, 0)

    async def pulse(self) -> dict[str, float]:
        """Tokens written so far, and generations that are not complete."""
        self._alive.settle()
        return {"tokens": self._alive.tokens, "running": float(self._alive.num_unfinished)}

    async def isolation(self) -> dict[str, str]:
        """It runs nothing that would have to be isolated."""
        return {}

    async def use_actors(self, *_: Any) -> None:
        """Rewards and tools are part of the model."""

    async def close(self) -> None:
        """The end, when asked politely."""

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _alive(self) -> EngineModel:
        assert self.engine is not None, "the fleet calls a worker whose engine has not started"
        return self.engine

    async def _rollout(self, size: Size, sibling: int, budget: int, *, uninformative: bool) -> Rollout:
        """Written in as many parts as there are tool calls, and one; siblings read their prompt once."""
        left = min(size.tokens, budget)
        written, first, last = left, -1, -1
        for number, seconds in enumerate((*size.tools, None)):
            part = max(1, left // (len(size.tools) + 1 - number))
            prompt = size.prompt if not sibling and not number else 0
            begun, last = await self._alive.generate(part, prompt=prompt)
            first = begun if number == 0 else first
            left -= part
            if seconds is not None:
                await asyncio.sleep(seconds)
        await asyncio.sleep(size.reward)
        reward = 1.0 if uninformative else float(sibling % 2)
        return _light_rollout(first, last, tokens=written, prompt=size.prompt, reward=reward)

    def _hang(self) -> None:
        self.hangs = True
        self._alive.stop()

    def kill(self, *, restart: bool = False) -> None:
        """End it now, with its engine."""
        if self.engine is not None:
            self.engine.stop()
        if self._fate is not None:
            self._fate.cancel()
        super().kill(restart=restart)

    def add_to(self, sums: Sums) -> None:
        """Add what the engine has done until now."""
        if self.engine is None:
            return
        self.engine.settle()
        sums.tokens += self.engine.tokens
        sums.busy_seconds += self.engine.busy_seconds
        sums.rollout_seconds += self.engine.rollout_seconds
        sums.engine_seconds += self.engine.age


def _light_rollout(first: int, last: int, *, tokens: int, prompt: int, reward: float) -> Rollout:
    """Two tokens stand for all; thousands of long rollouts would not fit into memory."""
    versions = np.array([first, last], dtype=np.int32)
    return Rollout(
        tokens=np.zeros(2, dtype=np.int32),
        loss_mask=np.ones(2, dtype=np.bool_),
        logprobs=np.zeros(2, dtype=np.float32),
        versions=versions,
        reward=reward,
        metrics={"response_tokens": float(tokens), "prompt_tokens": float(prompt)},
    )
