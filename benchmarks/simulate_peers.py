"""Loops of other systems on our modelled engines, as far as their timing goes; `benchmarks.simulate` says why.

Sources: verl's `docs/advance/fully_async.md` (modes b and d) and RollPacker, arXiv 2509.21009 (tail batching).
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlsys.simulate import clock
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.engine import EngineModel
from rlsys.simulate.sizes import Draw, modelled

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A system's engines and batch."""

    model: SimulateConfig
    engines: int
    max_rollouts: int
    groups: int
    """Problems of one policy step."""
    group_size: int
    max_tokens: int


class _Engines:
    """All engines behind one door: a rollout goes to the one that was given the fewest."""

    def __init__(self, setting: Setting, draw: Draw) -> None:
        self._setting, self._draw = setting, draw
        model = setting.model
        self.all = [
            EngineModel(
                seconds=model.decode_seconds,
                seconds_per_rollout=model.decode_seconds_per_rollout,
                prefill=model.prefill_tokens_per_second,
                max_running=setting.max_rollouts,
            )
            for _ in range(setting.engines)
        ]
        self._load = [(0, index) for index in range(setting.engines)]

    def lengths(self, problem: int, count: int) -> list[int]:
        """Tokens of the siblings of a problem."""
        return [min(size.tokens, self._setting.max_tokens) for size in self._draw(problem, count)]

    async def rollout(self, tokens: int) -> int:
        """Generate; returns the tokens."""
        load, index = heapq.heappop(self._load)  # what it was given so far, so that all have equally many
        heapq.heappush(self._load, (load + 1, index))
        await self.all[index].generate(tokens, prompt=0)
        return tokens


# --- verl ------------------------------------------------------------------------------------------------------------


def verl_step_seconds(
    setting: Setting, *, staleness: float, updates: int, update_seconds: float, steps: int, seed: int = 0
) -> float:
    """Mean time between parameter updates of verl's fully asynchronous trainer with partial rollouts.

    Between two updates the rollouter begins at most `(1 + staleness) * groups` problems less those begun earlier and
    not trained yet; the trainer takes complete groups in the order in which they end and makes `updates` local
    updates, each on `groups / updates` of them, between two parameter updates.
    """
    return clock.run(_verl(setting, staleness, updates, update_seconds, steps, seed))


async def _verl(
    setting: Setting, staleness: float, updates: int, update_seconds: float, steps: int, seed: int
) -> float:
    engines = _Engines(setting, modelled(setting.model, seed=seed))
    ready: asyncio.Queue[int] = asyncio.Queue()
    tasks: set[asyncio.Task[None]] = set()
    begun = trained = 0

    async def group(problem: int) -> None:
        lengths = engines.lengths(problem, setting.group_size)
        await asyncio.gather(*(engines.rollout(tokens) for tokens in lengths))
        ready.put_nowait(problem)

    now = asyncio.get_running_loop().time
    ends = []
    for _ in range(steps):
        while begun - trained < (1 + staleness) * setting.groups:
            begun += 1
            task = asyncio.create_task(group(begun))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for _ in range(updates):
            for _ in range(setting.groups // updates):
                await ready.get()
            await asyncio.sleep(update_seconds / updates)
        trained += setting.groups
        for engine in engines.all:
            engine.pause()
        await asyncio.sleep(setting.model.transfer_seconds)
        for engine in engines.all:
            engine.resume(trained)
        ends.append(now())
    for task in tasks:
        task.cancel()
    return (ends[-1] - ends[1]) / (len(ends) - 2)


def verl_sync_step_seconds(setting: Setting, *, learn_seconds: float, steps: int, seed: int = 0) -> float:
    """Mean step time where the same devices generate, all of a batch, and then learn."""

    async def main() -> float:
        engines = _Engines(setting, modelled(setting.model, seed=seed))
        for step in range(steps):
            lengths = (
                engines.lengths(step * setting.groups + group, setting.group_size) for group in range(setting.groups)
            )
            await asyncio.gather(*(engines.rollout(tokens) for group in lengths for tokens in group))
            await asyncio.sleep(learn_seconds + setting.model.transfer_seconds)
        return asyncio.get_running_loop().time() / steps

    return clock.run(main())


# --- RollPacker ------------------------------------------------------------------------------------------------------


def rollpacker_seconds(
    setting: Setting, *, ranks: int, ratio: float, steps: int, seed: int = 0
) -> tuple[float, float, float]:
    """Step times of plain synchronous training and of tail batching, and the share of rollouts in the former.

    A short round begins `ratio` times as many problems and siblings and keeps the first; the problems that it gave up
    are the batch of a long round as soon as there are enough of them. Both are on-policy. Left out: their planner of
    parallelism, their scheduling of rewards, and that training streams.
    """
    plain, tokens, rolled = clock.run(_rounds(setting, 1.0, ranks, steps, seed))
    packed, fewer, _ = clock.run(_rounds(setting, ratio, ranks, steps, seed))
    del tokens, fewer
    return plain, packed, rolled / plain


async def _rounds(setting: Setting, ratio: float, ranks: int, steps: int, seed: int) -> tuple[float, float, float]:
    """Mean seconds, tokens and rollout seconds of a step."""
    engines = _Engines(setting, modelled(setting.model, seed=seed))
    fresh = iter(range(1 << 40))
    given_up: list[int] = []
    now = asyncio.get_running_loop().time
    total = rolled = 0.0
    for _ in range(steps):
        began = now()
        if len(given_up) >= setting.groups:
            batch, given_up = given_up[: setting.groups], given_up[setting.groups :]
            found = await _race(engines, batch, setting, siblings=setting.group_size)
        else:
            batch = list(_take(fresh, round(ratio * setting.groups)))
            found = await _race(engines, batch, setting, siblings=round(ratio * setting.group_size))
            given_up += [problem for problem in batch if problem not in found]
        rolled += now() - began
        tokens = sum(sum(lengths) for lengths in found.values())
        total += tokens
        prompts = setting.groups * setting.group_size * setting.model.prompt_tokens
        await asyncio.sleep(setting.model.learner_seconds(tokens + prompts, ranks) + setting.model.transfer_seconds)
    return now() / steps, total / steps, rolled / steps


async def _race(engines: _Engines, batch: Sequence[int], setting: Setting, *, siblings: int) -> dict[int, list[int]]:
    """The first groups that are complete, with the lengths of their first siblings; the rest is given up."""

    async def group(problem: int) -> tuple[int, list[int]]:
        lengths = engines.lengths(problem, siblings)
        return problem, await _first(
            [asyncio.create_task(engines.rollout(tokens)) for tokens in lengths], setting.group_size
        )

    return dict(await _first([asyncio.create_task(group(problem)) for problem in batch], setting.groups))


async def _first(tasks: list[asyncio.Task[_Found]], count: int) -> list[_Found]:
    """The results of those that end first; the others are cancelled."""
    found: list[_Found] = []
    try:
        for task in asyncio.as_completed(tasks):
            found.append(await task)
            if len(found) == count:
                break
        return found
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _take(numbers: Iterator[int], count: int) -> Iterator[int]:
    return (next(numbers) for _ in range(count))
