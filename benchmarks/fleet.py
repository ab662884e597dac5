"""What the fleet costs and gains: training while generating, weights to two engines, deaths and newcomers.

    python -m benchmarks.fleet                 # all; --only overlap, lengths, events or prefixes for one

All on the real stack: Ray, vLLM engines, one FSDP2 rank, the tiny untrained model (3.3 M parameters), `eos` ignored.

`overlap`: seconds of a policy step when generation goes on meanwhile (`Loop` at staleness 1), over the larger of the
seconds that the rollouts of a step take alone and the seconds that learning and publishing take alone. Engine and
learner have a core each, as if each had a machine. The sizes are chosen so that neither side is much shorter.

`lengths`: the same loop at staleness 4 and 0 on the same groups with lognormal response lengths (median 48, one in a
hundred above 250), trained tokens per second of one over the other.

`events`: how long it takes from noticing that a worker was killed (SIGKILL, while it serves) to its last group being
at another worker; from asking for one more worker to its serving, without the start of its engine; both as the fleet's
own log of events has them.

`prefixes`: prompt tokens that engines found in their caches, over all prompt tokens, of one engine and of two, with the
same groups of 8, whose prompts have some 600 tokens.

Checked: every step trains the same number of rollouts; the tokens of both sides differ by 10 % at most; no group is
lost.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.ours import FixedLengthActor, config_for, problems, tiny_model
from rlsys import cluster
from rlsys.advantages import grpo
from rlsys.config import Config, SamplingConfig
from rlsys.fleet import RolloutFleet
from rlsys.learner_group import LearnerGroup
from rlsys.learners.fsdp import FsdpLearner
from rlsys.ledger import Ledger
from rlsys.loop import Loop
from rlsys.stages.common import assemble
from rlsys.types import Problem, RolloutGroup
from rlsys.workers import WorkerState

GROUPS, GROUP_SIZE, WARM_STEPS, STEPS = 8, 8, 5, 8
_CORES = sorted(os.sched_getaffinity(0))


class PinnedActor(FixedLengthActor):
    """A rollout actor that keeps to the first core, and its engine with it."""

    async def start(self) -> str:
        """As the parent does."""
        os.sched_setaffinity(0, {_CORES[0]})
        return await super().start()


class CountingActor(FixedLengthActor):
    """A rollout actor that can be asked how much of its prompts the engine had in its cache, and for its process."""

    async def start(self) -> str:
        """As the parent does, with an engine that counts."""
        backend = await super().start()
        self._asked = self._cached = 0
        generate = self._engine._engine._llm.generate

        async def counting(prompt: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
            last = None
            async for output in generate(prompt, *arguments, **keywords):
                last = output
                yield output
            if last is not None:
                self._asked += len(prompt["prompt_token_ids"])
                self._cached += last.num_cached_tokens or 0

        self._engine._engine._llm.generate = counting
        return backend

    async def cached(self) -> tuple[int, int]:
        """Prompt tokens that were found in the cache, and all of them, since the last time."""
        found, self._asked, self._cached = (self._cached, self._asked), 0, 0
        return found

    async def process(self) -> int:
        """The id of this actor's process."""
        return os.getpid()


class PinnedLearner(FsdpLearner):
    """A learner that keeps to the last core."""

    def start(self, **keywords: Any) -> Any:
        """As the parent does."""
        os.sched_setaffinity(0, {_CORES[-1]})
        return super().start(**keywords)


class Stack:
    """Engines and one learner rank, with a loop that can be stopped and started between rounds."""

    def __init__(self, config: Config, fleet: RolloutFleet, learners: LearnerGroup) -> None:
        self._config, self.fleet, self._learners = config, fleet, learners
        self._stream = problems(4096)
        self._version = 0
        self._tokens: list[int] = []

    @classmethod
    async def start(cls, model: Path, *, tokens: int) -> Stack:
        """One engine and one rank, a core each."""
        config = config_for(
            model,
            max_response_tokens=tokens,
            max_model_tokens=1024,
            engines=1,
            ranks=1,
            max_rollouts=GROUPS * GROUP_SIZE,
            actor="benchmarks.fleet:PinnedActor",
        )
        config = replace(config, learners=replace(config.learners, use="benchmarks.fleet:PinnedLearner"))
        cluster.connect(config.cluster)
        fleet, learners = await asyncio.gather(
            RolloutFleet.start(config, str(model)),
            LearnerGroup.start(
                config, str(model), optimizer=config.rl.optimizer, total_steps=10**6, loss=config.rl.loss
            ),
        )
        learners.serve(fleet)
        await learners.publish(fleet, 0)
        return cls(config, fleet, learners)

    async def act(self, number: int, tokens: int) -> RolloutGroup:
        """One group of responses of exactly so many tokens."""
        sampling = SamplingConfig(temperature=1.0, max_response_tokens=tokens)
        problem = self._stream[number % len(self._stream)]
        return await self.fleet.act(problem, size=GROUP_SIZE, sampling=sampling, group_id=str(number))

    async def learn(self, groups: list[RolloutGroup]) -> None:
        """One update from these groups, published."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        must(len(rollouts) == GROUPS * GROUP_SIZE, f"a step had {len(rollouts)} rollouts")
        self._tokens.append(sum(rollout.num_trained_tokens for rollout in rollouts))
        advantages = [float(value) for group in groups for value in grpo(group.rewards)]
        await self._learners.step(
            assemble(rollouts, advantages), temperature=1.0, clip_low=0.2, clip_high=0.2, kl_coef=0.0
        )

    async def publish(self) -> None:
        """New weights to the engine."""
        self._version += 1
        await self._learners.publish(self.fleet, self._version)

    async def rollouts_alone(self, lengths: list[int]) -> Sample:
        """Seconds of a step's rollouts when nobody learns; as many are in flight as in the loop."""
        started, flying, number = time.perf_counter(), set(), 0
        while number < len(lengths) or flying:
            while number < len(lengths) and len(flying) < 2 * GROUPS:
                flying.add(asyncio.create_task(self.act(number, lengths[number])))
                number += 1
            _, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
        return {"seconds": (time.perf_counter() - started) * GROUPS / len(lengths)}

    async def learning_alone(self, lengths: list[int]) -> Sample:
        """Seconds of learning and publishing when nobody generates."""
        groups = await asyncio.gather(*(self.act(number, lengths[number]) for number in range(GROUPS)))
        started = time.perf_counter()
        for _ in range(STEPS):
            await self.learn(list(groups))
            await self.publish()
        return {"seconds": (time.perf_counter() - started) / STEPS}

    async def loop(self, lengths: list[int], *, max_staleness: int) -> Sample:
        """Seconds and tokens of a step of the training loop, its first steps left out."""
        ledger, ends = Ledger(), []
        ledger.step = self._version  # groups bear the versions of this engine
        self._tokens.clear()

        async def act(number: int, _: int) -> RolloutGroup:
            return await self.act(number - 1, lengths[(number - 1) % len(lengths)])

        async def learn(_: int, groups: Mapping[int, RolloutGroup]) -> None:
            await self.learn(list(groups.values()))

        async def publish(_: int) -> None:
            await self.publish()
            ends.append(time.perf_counter())

        loop = Loop(
            act=act,
            learn=learn,
            publish=publish,
            drop_reason=lambda *_: None,
            groups_per_step=GROUPS,
            max_staleness=max_staleness,
            max_skipped_groups=1,
        )
        steps = WARM_STEPS + STEPS
        await loop.run(ledger, iter(range(1, 10**6)), steps=ledger.step + steps, stop=asyncio.Event())
        must(ledger.conserved and ledger.trained == steps * GROUPS, f"groups were lost: {ledger.counts()}")
        seconds, tokens = ends[-1] - ends[WARM_STEPS - 1], sum(self._tokens[WARM_STEPS:])
        return {"seconds": seconds / STEPS, "tokens": tokens / STEPS, "tokens_per_second": tokens / seconds}

    async def close(self) -> None:
        """End everything that was started."""
        await asyncio.gather(self._learners.close(), self.fleet.close())
        cluster.disconnect()


async def overlap(options: Any, model: Path) -> dict[str, Any]:
    """The loop beside its two halves alone."""
    lengths = [options.tokens] * (GROUPS * (STEPS + 2))
    stack = await Stack.start(model, tokens=options.tokens)
    try:
        sides = {
            "rollouts": lambda: stack.rollouts_alone(lengths),
            "learning": lambda: stack.learning_alone(lengths),
            "together": lambda: stack.loop(lengths, max_staleness=1),
        }
        await stack.loop(lengths, max_staleness=1)  # warm-up
        samples = await common.race(sides, rounds=options.rounds, settle_seconds=options.settle, what="overlap: ")
    finally:
        await stack.close()
    slower = [
        {"seconds": max(one["seconds"], other["seconds"])}
        for one, other in zip(samples["rollouts"], samples["learning"], strict=True)
    ]
    ratio = common.ratios(samples["together"], slower)
    common.show("asynchronous step / the longer of its halves alone", ratio, "at most 1.15x")
    return {"samples": samples, "step_over_longer_half": ratio}


def lognormal_lengths(number: int) -> list[int]:
    """Response lengths of so many groups: median 48, one in a hundred above 250."""
    drawn = np.random.default_rng(7).lognormal(np.log(48), 0.71, number)
    return [int(length) for length in np.clip(drawn, 8, 512)]


async def lengths(options: Any, model: Path) -> dict[str, Any]:
    """Asynchronous and synchronous on groups of very different lengths."""
    drawn = lognormal_lengths(GROUPS * (WARM_STEPS + STEPS))
    stack = await Stack.start(model, tokens=512)
    try:
        sides = {
            "sync": lambda: stack.loop(drawn, max_staleness=0),
            "async": lambda: stack.loop(drawn, max_staleness=4),
        }
        await sides["async"]()
        samples = await common.race(sides, rounds=options.rounds, settle_seconds=options.settle, what="lengths: ")
    finally:
        await stack.close()
    tokens = common.ratios(samples["async"], samples["sync"], "tokens")
    must(0.9 < tokens["min"] <= tokens["max"] < 1.1, f"the sides had different work: {tokens}")
    ratio = common.ratios(samples["async"], samples["sync"], "tokens_per_second")
    common.show("trained tokens per second, asynchronous / synchronous", ratio, "1.6x")
    return {"samples": samples, "async_over_sync": ratio}


def long(problem: Problem) -> Problem:
    """The problem behind some 600 tokens of its own: an engine on a CPU caches blocks of 128."""
    digits = "".join(str(digit) for digit in np.random.default_rng(list(problem.id.encode())).integers(10, size=600))
    *before, last = problem.prompt
    return replace(problem, prompt=(*before, {**last, "content": f"{digits}\n{last['content']}"}))


async def prefixes(options: Any, model: Path) -> dict[str, Any]:
    """What share of the prompts' tokens is in the caches of one engine and of two."""
    shares = {}
    for engines in (1, 2):
        config = config_for(
            model,
            max_response_tokens=16,
            max_model_tokens=1024,
            engines=engines,
            actor="benchmarks.fleet:CountingActor",
        )
        cluster.connect(config.cluster)
        fleet = await RolloutFleet.start(config, str(model))
        try:
            sampling = SamplingConfig(temperature=1.0, max_response_tokens=16)
            chosen = [long(problem) for problem in problems(options.problems)]
            await asyncio.gather(*(fleet.act(one, size=8, sampling=sampling, group_id=one.id) for one in chosen))
            counted = await fleet.call_all("cached", seconds=60)
        finally:
            await fleet.close()
            cluster.disconnect()
        shares[engines] = sum(cached for cached, _ in counted) / sum(asked for _, asked in counted)
        say(f"prefixes: {engines} engine(s): {shares[engines]:.1%} of the prompt tokens came from caches")
    ratio = shares[2] / shares[1]
    say(f"hit rate, two engines / one: {ratio:.3f}   (target 0.95)")
    return {"shares": shares, "two_over_one": ratio}


async def events(options: Any, model: Path) -> dict[str, Any]:
    """Deaths and newcomers, from the fleet's own log of events."""
    config = config_for(
        model, max_response_tokens=256, max_model_tokens=512, engines=2, ranks=1, actor="benchmarks.fleet:CountingActor"
    )
    config = replace(config, actors=replace(config.actors, watch_seconds=1.0))
    cluster.connect(config.cluster)
    fleet, learners = await asyncio.gather(
        RolloutFleet.start(config, str(model)),
        LearnerGroup.start(config, str(model), optimizer=config.rl.optimizer, total_steps=10, loss=config.rl.loss),
    )
    found: list[Sample] = []
    try:
        learners.serve(fleet)
        await learners.publish(fleet, 0)
        for number in range(options.rounds):
            found.append(await _one_death(fleet, number))
            say(f"  events: round {number + 1}/{options.rounds}  " + common._short(found[-1]))
    finally:
        await asyncio.gather(learners.close(), fleet.close())
        cluster.disconnect()
    longest = {key: max(sample[key] for sample in found) for key in ("elsewhere", "serving")}
    say(f"from a death noticed to its last group elsewhere: at most {longest['elsewhere']:.3f} s   (target 3 s)")
    say(f"from an engine started to its worker serving: at most {longest['serving']:.3f} s   (target 3 s)")
    return {"samples": found, "longest": longest}


async def _one_death(fleet: RolloutFleet, number: int) -> Sample:
    """Kill a worker that serves, and wait until another one serves in its place."""
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=256)
    chosen = problems(GROUPS, seed=100 + number)
    tasks = [asyncio.create_task(fleet.act(one, size=8, sampling=sampling, group_id=one.id)) for one in chosen]
    await asyncio.sleep(0.3)
    victim = fleet.roster.serving[0]
    carried = victim.in_flight // 8
    process = await next(one for one in fleet.actors if one.name == victim.name).call("process")
    before = fleet.num_redispatched
    killed = time.time()
    os.kill(process, signal.SIGKILL)
    while fleet.num_redispatched - before < carried:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    moved = time.time()
    must(moved - killed < 120, "a death was noticed too late to speak of it")
    groups = await asyncio.gather(*tasks)
    must(all(len(group.rollouts) == 8 for group in groups), "a group was lost")
    while len(fleet.roster.serving) < 2:
        await asyncio.sleep(0.01)
    served = time.time()
    lost = next(when for when, name, what in reversed(fleet.events) if name == victim.name and "is lost" in what)
    newest = fleet.roster.serving[-1].name
    started = next(when for when, name, what in fleet.events if name == newest and what == "has started")
    must(not fleet.roster.in_state(WorkerState.STALE), "a worker is still waiting for weights")
    return {"noticed": lost - killed, "elsewhere": max(0.0, moved - lost), "serving": served - started}


RACES = {"overlap": overlap, "lengths": lengths, "prefixes": prefixes, "events": events}


async def main() -> None:
    """Run the races that were asked for, and write what came out."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--only", choices=list(RACES), help="one race")
    parser.add_argument("--tokens", type=int, default=96, help="overlap: tokens of a response")
    parser.add_argument("--problems", type=int, default=32, help="prefixes: groups of 8")
    options = parser.parse_args()
    common.set_threads()
    folder = Path(tempfile.mkdtemp(prefix="rlsys-fleet-"))
    try:
        model = tiny_model(folder / "model")
        chosen = [options.only] if options.only else list(RACES)
        results = {name: await RACES[name](options, model) for name in chosen}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    common.write("fleet" if options.only is None else f"fleet_{options.only}", options, results)


if __name__ == "__main__":
    asyncio.run(main())
