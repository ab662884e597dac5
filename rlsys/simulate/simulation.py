"""One simulated run: the real loop, ledger, fleet and weight sync around modelled workers and a modelled learner."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rlsys.config import Config
from rlsys.fleet import RolloutFleet
from rlsys.ledger import Ledger
from rlsys.loop import Loop
from rlsys.simulate import clock
from rlsys.simulate.config import SimulateConfig
from rlsys.simulate.learner import SimulatedLearners
from rlsys.simulate.sizes import draws
from rlsys.simulate.worker import SimulatedWorker, Sums, Surroundings
from rlsys.stages.collection import Collection
from rlsys.types import Problem, RolloutGroup

_PROMPT = ({"role": "user", "content": ""},)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulated run came to, in the policy steps after the first few, in which a queue fills."""

    workers: int
    learner_ranks: int
    steps: int
    """Policy steps that the means are over (`rl.steps`); `max_staleness + 1` more ran before them."""
    step_seconds: float
    """Mean time of a policy step, s."""
    rollout_seconds: float
    """Of it, time in which the learner waited for rollouts, s."""
    learn_seconds: float
    """Of it, time in which the learner learned, s."""
    publish_seconds: float
    """Of it, publishing, s."""
    tokens_per_second: float
    """Written tokens that were trained on."""
    groups_per_second: float
    """Groups that were trained on."""
    engine_idle: float
    """Share of the engines' time in which they generated nothing."""
    engine_fill: float
    """Rollouts that an engine generated at once, as a share of `actors.max_rollouts`, on average."""
    learner_idle: float
    """Share of the time in which the learner did not learn."""
    staleness_mean: float
    """Versions between a rollout's first token and the policy that is trained on it."""
    staleness_max: int
    seconds: float
    """The whole run, s."""
    redispatched: int
    """Groups that went to another worker, in the whole run."""
    deaths: int
    """Workers that were lost, in the whole run."""
    dropped: Mapping[str, int]
    """Groups that were not trained on, by reason, in the whole run."""
    ledger: Mapping[str, int]
    """Problems issued, in flight, done, trained, dropped, in the whole run."""
    driver_share: float
    """Processor time of this process for each simulated second. The driver of a real run has less to do: it does not
    compute the engines."""


def simulate(config: Config) -> Simulated:
    """Run policy steps in virtual time; the same configuration gives the same result, but for `driver_share`."""
    return clock.run(_Simulation(config).run())


def without_faults(config: Config) -> Config:
    """The same run with workers that never die."""
    model = config.simulate or SimulateConfig()
    return replace(config, simulate=replace(model, hours_between_deaths=None))


class _Simulation:
    """The parts of a run and what is counted on the way."""

    def __init__(self, config: Config) -> None:
        self._config, self._stage = config, config.rl
        self._model = config.simulate or SimulateConfig()
        self._around = Surroundings(
            model=self._model,
            max_rollouts=config.actors.max_rollouts,
            call_seconds=config.cluster.call_seconds,
            seed=config.seed,
            draw=draws(self._model, seed=config.seed),
        )
        self._workers: list[SimulatedWorker] = []
        self._collection = Collection(config, {}, step=1)
        self._ledger = Ledger()
        self._lead = config.rl.max_staleness + 1
        self._stop = asyncio.Event()
        self._waited_from = 0.0
        self._sums = {"rollout": 0.0, "learn": 0.0, "publish": 0.0, "tokens": 0.0, "groups": 0.0}
        self._staleness: list[int] = []
        self._from = (0.0, Sums())

    # --- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> Simulated:
        """Start, train, end, sum up."""
        cpu = time.process_time()
        self._fleet = RolloutFleet(self._config.actors, self._place)
        self._learners = SimulatedLearners(self._model, self._config)
        try:
            await self._fleet.started()
            self._learners.serve(self._fleet)
            await self._learners.publish(self._fleet, 0)
            self._begin()
            steps = self._stage.steps + 2 * self._lead  # towards its last steps a loop starts fewer groups
            await self._loop().run(self._ledger, itertools.count(1), steps=steps, stop=self._stop)
            return self._result(time.process_time() - cpu)
        finally:
            await self._learners.close()
            await self._fleet.close()

    def _place(self, index: int) -> SimulatedWorker:
        worker = SimulatedWorker(index, self._around)
        self._workers.append(worker)
        return worker

    def _loop(self) -> Loop:
        return Loop(
            act=self._act,
            learn=self._learn,
            publish=self._publish,
            drop_reason=self._drop_reason,
            groups_per_step=self._stage.groups_per_step,
            max_staleness=self._stage.max_staleness,
            max_skipped_groups=self._stage.max_skipped_groups,
            at_groups=self._stage.update == "at_groups",
        )

    # --- what the loop calls -----------------------------------------------------------------------------------------

    async def _act(self, number: int, attempt: int) -> RolloutGroup:
        dull = np.random.default_rng([self._config.seed, 1, number]).random() < self._model.uninformative
        budget = self._stage.budget(self._ledger.step + 1)
        return await self._fleet.act(
            Problem(id=str(number), prompt=_PROMPT, metadata={"dull": bool(dull)}),
            size=self._stage.group_size,
            sampling=replace(self._stage.sampling, max_response_tokens=budget),
            group_id=f"simulated-{number}-{attempt}",
        )

    def _drop_reason(self, number: int, group: RolloutGroup) -> str | None:  # noqa: ARG002
        return self._collection.add(group)

    async def _learn(self, step: int, groups: Mapping[int, RolloutGroup]) -> None:
        now = asyncio.get_running_loop().time
        self._sums["rollout"] += now() - self._waited_from
        rollouts = [rollout for group in groups.values() for rollout in group.rollouts]
        staleness = [step - 1 - rollout.first_version for rollout in rollouts]
        assert max(staleness) <= self._stage.max_staleness, "the loop broke its staleness bound"
        written = sum(rollout.metrics["response_tokens"] for rollout in rollouts)
        read = sum(rollout.metrics["prompt_tokens"] for rollout in rollouts)
        began = now()
        await self._learners.learn(int(written + read))
        self._waited_from = now()
        self._sums["learn"] += self._waited_from - began
        self._sums["tokens"] += written
        self._sums["groups"] += len(groups)
        self._staleness += staleness
        self._collection = Collection(self._config, {}, step=step + 1)

    async def _publish(self, step: int) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        self._sums["rollout"] += began - self._waited_from  # for groups to end, where weights change between them only
        await self._learners.publish(self._fleet, step)
        self._sums["publish"] += now() - began
        await asyncio.sleep(self._model.step_seconds)
        self._waited_from = now()
        if step == self._lead:
            self._begin()
        elif step == self._lead + self._stage.steps:
            self._stop.set()

    # --- sums --------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """What is counted for the means begins now."""
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._staleness = []
        self._waited_from = asyncio.get_running_loop().time()
        self._from = (self._waited_from, self._engines())

    def _engines(self) -> Sums:
        """What all engines have done until now, those that ended included."""
        found = Sums()
        for worker in self._workers:
            worker.add_to(found)
        return found

    def _result(self, cpu_seconds: float) -> Simulated:
        began, before = self._from
        after, ended = self._engines(), asyncio.get_running_loop().time()
        passed, steps = ended - began, self._stage.steps
        engine_seconds = after.engine_seconds - before.engine_seconds
        sums = self._sums
        assert self._ledger.conserved, f"a problem was lost: {self._ledger.counts()}"
        return Simulated(
            workers=self._config.actors.count,
            learner_ranks=self._config.learners.count,
            steps=steps,
            step_seconds=passed / steps,
            rollout_seconds=sums["rollout"] / steps,
            learn_seconds=sums["learn"] / steps,
            publish_seconds=sums["publish"] / steps,
            tokens_per_second=sums["tokens"] / passed,
            groups_per_second=sums["groups"] / passed,
            engine_idle=1 - (after.busy_seconds - before.busy_seconds) / engine_seconds,
            engine_fill=(after.rollout_seconds - before.rollout_seconds)
            / engine_seconds
            / self._config.actors.max_rollouts,
            learner_idle=1 - sums["learn"] / passed,
            staleness_mean=float(np.mean(self._staleness)),
            staleness_max=max(self._staleness),
            seconds=ended,
            redispatched=self._fleet.num_redispatched,
            deaths=sum(worker.dead for worker in self._workers),
            dropped=dict(Counter(self._ledger.dropped)),
            ledger=self._ledger.counts(),
            driver_share=cpu_seconds / ended,
        )
