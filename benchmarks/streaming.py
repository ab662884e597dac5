"""Rollouts that call tools: each a coroutine of its own (ours) against the same rollouts turn by turn with a barrier.

    python -m benchmarks.streaming

A plan says for each of 96 rollouts how many turns it has (1 to 5), how many tokens it writes in each, and how long each
tool call takes (lognormal, median 0.1 s, sigma 1). All sides follow the same plans, for three seeds, 32 in flight.

Streaming: `run_rollout` as it is; a rollout goes on as soon as its own tool answered, and the next one starts when one
ends. Barrier: 32 rollouts at a time, all generate, then all tools run (side by side), then the next turn; the next 32
start when the last of them ended. Refilled: a stronger barrier; at each turn those that ended are replaced by new ones.

Real on all sides, and the same code: `run_rollout`, chat template, parsing of the call, tool sessions, token axis,
reward, and a vLLM engine (float32, 3.3 M parameters, one thread) that writes every token. Replaced, because an
untrained model calls no tool: `PlannedEngine` asks vLLM for exactly the planned number of tokens (`eos` ignored), then
reports that it stopped at the end of a code block and gives a fixed call as the text to parse; the tool sleeps (no
CPU). The barriers are the same coroutines, made to wait for one another at a `TurnGate`.

Checked: every rollout of every side wrote the planned tokens, called its tools as often as planned and read as many
tokens.

Not comparable: real tools use CPU too, and real plans depend on the policy; the gain grows with the spread of the
latencies.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.ours import config_for, problems, tiny_model
from rlsys.actors.engine import VllmEngine
from rlsys.chat import Chat
from rlsys.config import ChatConfig, SamplingConfig
from rlsys.interfaces import ToolResult
from rlsys.reward_terms import RewardTerm
from rlsys.rollout import run_rollout
from rlsys.types import Completion, Problem, Rollout

MAX_TURNS, CALL, OUTPUT = 5, "```python\n0\n```\n", "0"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rollout does: `tokens` of each turn, and the seconds of the tool call after each but the last."""

    tokens: tuple[int, ...]
    tool_seconds: tuple[float, ...]


def draw_plans(count: int, *, seed: int, median: float, sigma: float, tokens: tuple[int, int]) -> list[Plan]:
    """Plans for so many rollouts; the same seed gives the same plans."""
    random = np.random.default_rng(seed)
    plans = []
    for _ in range(count):
        turns = int(random.integers(1, MAX_TURNS + 1))
        written = tuple(int(n) for n in random.integers(tokens[0], tokens[1] + 1, size=turns))
        waits = tuple(float(s) for s in random.lognormal(np.log(median), sigma, size=turns - 1))
        plans.append(Plan(tokens=written, tool_seconds=waits))
    return plans


class TurnGate:
    """Lets rollouts go on only when all that are in this phase (generating, or calling tools) have finished it."""

    def __init__(self) -> None:
        self._active = 0
        self._waiting = 0
        self._generating = True
        self._opened = asyncio.Event()
        self._joining: list[asyncio.Event] = []

    async def join(self) -> None:
        """Begin with the next turn; at once where nobody is on the way."""
        event = asyncio.Event()
        self._joining.append(event)
        if self._active == 0:
            # A moment for others that want to begin at the same time.
            asyncio.get_running_loop().call_soon(self._open_if_complete)
        await event.wait()

    async def arrive(self) -> None:
        """This rollout has finished the phase; wait for the others."""
        self._waiting += 1
        opened = self._opened
        self._open_if_complete()
        await opened.wait()

    def leave(self) -> None:
        """This rollout has ended; nobody waits for it any more."""
        self._active -= 1
        self._open_if_complete()

    def _open_if_complete(self) -> None:
        if self._waiting < self._active:
            return
        self._generating = not self._generating if self._active else True
        self._waiting = 0
        self._opened.set()
        self._opened = asyncio.Event()
        if self._generating:
            self._active += len(self._joining)
            for event in self._joining:
                event.set()
            self._joining.clear()


class PlannedEngine:
    """The shared vLLM engine, made to follow the plan of one rollout."""

    def __init__(self, engine: VllmEngine, plan: Plan, gate: TurnGate | None) -> None:
        self._engine, self._plan, self._gate = engine, plan, gate
        self._turn = 0

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        """The planned tokens, written by vLLM; then a call, or the end after the last turn."""
        tokens = self._plan.tokens[self._turn]
        options = {**sampling, "max_tokens": tokens, "ignore_eos": True, "stop": []}
        completion = await self._engine.generate(prompt, sampling=options)
        must(len(completion.tokens) == tokens, f"planned {tokens} tokens, written {len(completion.tokens)}")
        self._turn += 1
        last = self._turn == len(self._plan.tokens)
        if self._gate is not None and not last:
            await self._gate.arrive()
        return replace(completion, finish_reason="stop" if last else "stop_string", text="" if last else CALL)


class SleepingTool:
    """A tool that takes the planned time and no CPU. It is also its own session: one for each rollout."""

    name, description, parameters = "python", "waits", {}

    def __init__(self, plan: Plan, gate: TurnGate | None) -> None:
        self._waits = iter(plan.tool_seconds)
        self._gate = gate

    async def open(self, _: str) -> SleepingTool:
        """A session."""
        return self

    async def call(self, _: Mapping[str, Any]) -> ToolResult:
        """Wait as planned."""
        await asyncio.sleep(next(self._waits))
        if self._gate is not None:
            await self._gate.arrive()
        return ToolResult(text=OUTPUT)

    async def close(self) -> None:
        """Nothing is open."""


class Side:
    """All ways of running one set of plans on one engine."""

    def __init__(self, engine: VllmEngine, tokenizer: Any, sampling: SamplingConfig, context: int, window: int) -> None:
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._context, self._window = context, window
        self._rewards = [RewardTerm(name="vowels", weight=1.0, reward=common.vowel_share)]

    async def _rollout(self, problem: Problem, plan: Plan, gate: TurnGate | None) -> Rollout:
        if gate is not None:
            await gate.join()
        rollout = await run_rollout(
            problem,
            engine=PlannedEngine(self._engine, plan, gate),
            chat=Chat(self._tokenizer, [SleepingTool(plan, gate)]),
            rewards=self._rewards,
            sampling=self._sampling,
            max_model_tokens=self._context,
            rollout_id=problem.id,
        )
        assert rollout is not None
        if gate is not None:
            gate.leave()
        return rollout

    async def streaming(self, chosen: Sequence[Problem], plans: Sequence[Plan]) -> list[Rollout]:
        """Every rollout by itself, a window of them in flight."""
        return await self._in_window(chosen, plans, None)

    async def refilled(self, chosen: Sequence[Problem], plans: Sequence[Plan]) -> list[Rollout]:
        """Turn by turn; who ended is replaced at the next turn."""
        return await self._in_window(chosen, plans, TurnGate())

    async def barrier(self, chosen: Sequence[Problem], plans: Sequence[Plan]) -> list[Rollout]:
        """Turn by turn, a window after another."""
        rollouts: list[Rollout] = []
        for first in range(0, len(plans), self._window):
            part = slice(first, first + self._window)
            rollouts += await self._in_window(chosen[part], plans[part], TurnGate())
        return rollouts

    async def _in_window(
        self, chosen: Sequence[Problem], plans: Sequence[Plan], gate: TurnGate | None
    ) -> list[Rollout]:
        slots = asyncio.Semaphore(self._window)

        async def one(problem: Problem, plan: Plan) -> Rollout:
            async with slots:
                return await self._rollout(problem, plan, gate)

        return list(await asyncio.gather(*(one(p, plan) for p, plan in zip(chosen, plans, strict=True))))

    async def arm(self, way: str, chosen: Sequence[Problem], plans: Sequence[Plan]) -> Sample:
        """One timed arm, from an empty prefix cache; every rollout must have followed its plan."""
        await self._engine.pause()
        await self._engine.resume(0)
        started = time.perf_counter()
        rollouts = await getattr(self, way)(chosen, plans)
        seconds = time.perf_counter() - started
        for rollout, plan in zip(rollouts, plans, strict=True):
            must(rollout.num_trained_tokens == sum(plan.tokens), "a rollout did not write the planned tokens")
            must(rollout.metrics["tool_calls"] == len(plan.tool_seconds), "a rollout did not make the planned calls")
            must(rollout.metrics["tool_errors"] == 0, "a tool call failed")
        written = sum(rollout.num_trained_tokens for rollout in rollouts)
        return {"seconds": seconds, "written": written, "read": sum(map(len, rollouts)) - written}


async def main() -> None:
    """Warm up, race every seed, write."""
    parser = common.arguments(__doc__)
    parser.add_argument("--rollouts", type=int, default=96)
    parser.add_argument("--window", type=int, default=32, help="rollouts in flight")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--latency", type=float, default=0.1, help="median seconds of a tool call")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the logarithm of the latency")
    parser.add_argument("--tokens", type=int, nargs=2, default=[16, 64], help="least and most tokens of a turn")
    options = parser.parse_args()
    common.set_threads()
    common.quiet_vllm()
    folder = Path(tempfile.mkdtemp(prefix="streaming_"))
    model = tiny_model(folder / "model")
    context = 1024
    config = config_for(model, max_response_tokens=context - 128, max_model_tokens=context, max_rollouts=options.window)
    sampling = replace(config.rl.sampling, max_tool_calls=MAX_TURNS)
    engine = VllmEngine(model_path=str(model), config=config.actors, seed=0)
    await engine.resume(0)
    tokenizer = Chat.load(str(model), [], ChatConfig()).tokenizer
    side = Side(engine, tokenizer, sampling, context, options.window)
    chosen = problems(options.rollouts)
    ways = ("streaming", "barrier", "refilled")
    samples: dict[str, dict[str, list[Sample]]] = {}
    try:
        draw = {"median": options.latency, "sigma": options.sigma, "tokens": tuple(options.tokens)}
        await side.arm("streaming", chosen, draw_plans(options.rollouts, seed=99, **draw))
        for seed in options.seeds:
            plans = draw_plans(options.rollouts, seed=seed, **draw)
            arms = {way: (lambda way=way, plans=plans: side.arm(way, chosen, plans)) for way in ways}
            raced = await common.race(arms, rounds=options.rounds, settle_seconds=options.settle, what=f"seed {seed} ")
            work = {(sample["written"], sample["read"]) for arm in raced.values() for sample in arm}
            must(len(work) == 1, f"tokens written and read differ: {work}")
            samples[str(seed)] = raced
    finally:
        engine.close()
    joined = {way: [sample for seed in samples.values() for sample in seed[way]] for way in ways}
    found = {way: common.ratios(joined[way], joined["streaming"]) for way in ways[1:]}
    for seed, raced in samples.items():
        say(f"seed {seed}: " + ", ".join(f"{way} {common.median(raced[way]):.2f} s" for way in ways))
    common.show("time, barrier / streaming", found["barrier"], "2.2x")
    common.show("time, refilled barrier / streaming", found["refilled"])
    common.write("streaming", options, {"ratios": found, "samples": samples})
    shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(main())
