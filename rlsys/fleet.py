"""The driver's view of the two groups of actors: rollout actors and learner ranks, and weights going between them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys import cluster
from rlsys.cluster import Actor, Demand
from rlsys.config import Config, OptimizerConfig, SamplingConfig
from rlsys.demonstrations import Segments
from rlsys.errors import ActorError, TrainingStalledError, WeightSyncError
from rlsys.packing import MicroBatch, shard, unpack
from rlsys.plugins import resolve
from rlsys.pool import ActorPool, pooled_plug_ins
from rlsys.types import NetworkKind, Problem, RolloutGroup, TrainBatch
from rlsys.weights import WeightGroup, WeightPlan, verify

_SAVED_EVERY_SECONDS = 0.2
"""How often the ranks are asked whether a checkpoint is written."""


def rollout_demand(config: Config) -> Demand:
    """What the rollout actors take from the cluster."""
    actors = config.actors
    return Demand(
        what="rollout actor", count=actors.count, cpus=actors.cpus, gpus=actors.gpus, resources=actors.resources
    )


def learner_demand(config: Config, *, what: str = "learner rank") -> Demand:
    """What the learner ranks take from the cluster."""
    learners = config.learners
    return Demand(what=what, count=learners.count, cpus=learners.cpus, gpus=learners.gpus, resources=learners.resources)


def with_critic_ranks(config: Config) -> Config:
    """The configuration as the critic's learners see it: number and resources of their ranks are `rl.critic`'s own."""
    critic = config.rl.critic
    assert critic is not None
    ranks = {name: getattr(critic, name) for name in ("count", "cpus", "gpus", "resources")}
    return replace(config, learners=replace(config.learners, **ranks))


class RolloutFleet:
    """The rollout actors, and the pools of plug-ins that have actors of their own, by their place in the configuration.

    Each problem goes to the rollout actor that carries the fewest; one that failed a call, only where all others did.
    """

    def __init__(self, actors: list[Actor], backend: str, pools: Mapping[str, ActorPool]) -> None:
        self.actors = actors
        self.backend = backend
        self.pools = pools
        self._load = [0] * len(actors)
        self._failures = [0] * len(actors)

    @classmethod
    async def start(cls, config: Config, model_path: str) -> RolloutFleet:
        """Place the actors and start engines and pools, side by side."""
        demand = rollout_demand(config)
        actor_class = resolve(config.actors.use, place="actors.use")
        arguments = [{"config": config, "model_path": model_path, "index": index} for index in range(demand.count)]
        actors = cluster.place(
            actor_class, demand, arguments, call_seconds=config.cluster.call_seconds, concurrency=4096
        )
        pools = {place: ActorPool(plug_in, place=place) for place, plug_in in pooled_plug_ins(config).items()}
        backend, *_ = await asyncio.gather(
            *(actor.call("start", seconds=config.actors.start_seconds) for actor in actors),
            *(pool.start() for pool in pools.values()),
        )
        fleet = cls(actors, backend, pools)
        for place, pool in pools.items():
            seconds = config.actors.sync_seconds
            await pool.serve(partial(fleet.call_all, "use_actors", place, seconds=seconds))
        return fleet

    async def isolation(self) -> dict[str, str]:
        """The tier of every tool or reward that has one, as `isolation_NAME`; the weakest where hosts differ."""
        everyone = [*self.actors, *(actor for pool in self.pools.values() for actor in pool.actors)]
        found: dict[str, str] = {}
        for tiers in await asyncio.gather(*(actor.call("isolation") for actor in everyone)):
            for name, tier in tiers.items():
                found[f"isolation_{name}"] = min(tier, found.get(f"isolation_{name}", tier))
        return found

    async def act(
        self, problem: Problem, *, size: int, sampling: SamplingConfig, group_id: str, prefix: Segments = ()
    ) -> RolloutGroup:
        """Roll out one problem on the least loaded actor; the policy goes on behind `prefix`."""
        return await self._on_one("act", problem, size=size, sampling=sampling, group_id=group_id, prefix=prefix)

    async def compare(self, group: RolloutGroup) -> RolloutGroup:
        """The group with what the rewards that compare siblings, and these alone, give each of them."""
        return await self._on_one("compare", group)

    async def _on_one(self, method: str, *args: Any, **kwargs: Any) -> RolloutGroup:
        index = min(range(len(self.actors)), key=lambda actor: (self._failures[actor], self._load[actor]))
        self._load[index] += 1
        try:
            group = await self.actors[index].call(method, *args, **kwargs)
            assert isinstance(group, RolloutGroup)
            return group
        except ActorError:
            self._failures[index] += 1
            raise
        finally:
            self._load[index] -= 1

    async def call_all(self, method: str, *args: Any, seconds: float, **kwargs: Any) -> list[Any]:
        """Call every actor side by side."""
        return list(await asyncio.gather(*(a.call(method, *args, seconds=seconds, **kwargs) for a in self.actors)))

    async def close(self) -> None:
        """End all actors, politely first, because their engines have processes of their own."""
        await _close_all(self.actors)
        await asyncio.gather(*(pool.close() for pool in self.pools.values()))


class LearnerGroup:
    """The learner ranks as one learner."""

    def __init__(self, ranks: list[Actor], plan: WeightPlan, config: Config) -> None:
        self._ranks = ranks
        self._config = config
        self.plan = plan

    @classmethod
    async def start(
        cls,
        config: Config,
        model_path: str,
        *,
        optimizer: OptimizerConfig,
        total_steps: int,
        loss: str | Callable[..., Any],
        with_reference: bool = False,
        network: NetworkKind = "policy",
        what: str = "learner rank",
    ) -> LearnerGroup:
        """Place the ranks, load the model on all of them, let them meet; messages call them `what`."""
        demand = learner_demand(config, what=what)
        learner_class = resolve(config.learners.use, place="learners.use")
        arguments = [
            {"model_path": model_path, "config": config.learners, "rank": rank, "world_size": demand.count}
            for rank in range(demand.count)
        ]
        ranks = cluster.place(learner_class, demand, arguments, call_seconds=config.cluster.call_seconds)
        seconds = config.learners.start_seconds
        master = await ranks[0].call("rendezvous", seconds=seconds)
        keywords = {
            "master": master,
            "optimizer": optimizer,
            "total_steps": total_steps,
            "loss": resolve(loss, place="loss") if isinstance(loss, str) else loss,
            "with_reference": with_reference,
            "network": network,
            "timeout": seconds,
        }
        plans = await asyncio.gather(*(rank.call("start", seconds=seconds, **keywords) for rank in ranks))
        return cls(ranks, plans[0], config)

    async def step(self, batch: TrainBatch, *, temperature: float, **loss_options: Any) -> dict[str, float]:
        """One optimizer step; returns means over trained tokens, the gradient norm and the seconds it took."""
        results = await asyncio.gather(
            *(
                rank.call("step", share, num_tokens=batch.num_tokens, temperature=temperature, **loss_options)
                for rank, share in zip(self._ranks, self._to_ranks(self._shares(batch)), strict=True)
            )
        )
        return _merge(results, batch.num_tokens)

    async def infer(
        self, batch: TrainBatch, *, temperature: float, reference: bool = False
    ) -> list[NDArray[np.float32]]:
        """What the network says of the trained tokens: one array [T] for each rollout, 0 where none trains.

        Log-probs of the policy or, with `reference`, of the frozen one; of a critic, values.
        """
        shares = self._shares(batch)
        results = await asyncio.gather(
            *(
                rank.call("infer", share, temperature=temperature, reference=reference)
                for rank, share in zip(self._ranks, self._to_ranks(shares), strict=True)
            )
        )
        micro_batches = [micro for share in shares for micro in share]
        found = results[:: len(results) // len(shares)]
        return unpack(batch, micro_batches, [values for result in found for values in result])

    def _shares(self, batch: TrainBatch) -> list[list[MicroBatch]]:
        """A share for each rank, or for each few ranks that compute together."""
        learners = self._config.learners
        learner_class = resolve(learners.use, place="learners.use")
        together = learner_class.ranks_per_share(learners) if hasattr(learner_class, "ranks_per_share") else 1
        num_shares = len(self._ranks) // together
        return shard(batch, num_ranks=num_shares, max_tokens=learners.max_tokens_per_micro_batch)

    def _to_ranks(self, shares: Sequence[list[MicroBatch]]) -> list[Any]:
        """What each rank is to fetch; those that compute together, one behind the other, fetch the same."""
        together = len(self._ranks) // len(shares)
        return [reference for reference in map(cluster.put, shares) for _ in range(together)]

    async def open_weights(self, fleet: RolloutFleet) -> None:
        """Let learner and engines meet for weight transfers."""
        seconds = self._config.actors.sync_seconds
        address, port = await self._ranks[0].call("rendezvous")
        # A tensor-parallel engine has several workers; each is a rank of the group.
        workers = max(1, int(self._config.actors.gpus))
        group = WeightGroup(master_address=address, master_port=port, world_size=1 + workers * len(fleet.actors))
        await asyncio.gather(
            *(
                rank.call("open_weights", group, backend=fleet.backend, timeout=seconds, seconds=seconds)
                for rank in self._ranks
            ),
            *(
                actor.call("open_weights", group, rank=1 + workers * index, seconds=seconds)
                for index, actor in enumerate(fleet.actors)
            ),
        )

    async def publish(self, fleet: RolloutFleet, version: int) -> dict[str, float]:
        """Give every engine the current weights and prove that they arrived; then they are `version`.

        Generation is frozen, not aborted. On any disagreement the engines stay frozen.

        Raises:
            WeightSyncError: names the engine and the tensor.
        """
        seconds = self._config.actors.sync_seconds
        started = time.perf_counter()
        await fleet.call_all("pause", seconds=seconds)
        paused = time.perf_counter()
        sending = asyncio.gather(*(rank.call("send_weights", seconds=seconds) for rank in self._ranks))
        receiving = fleet.call_all("receive_weights", self.plan, seconds=seconds)
        sent, received = await asyncio.gather(sending, receiving)
        if sent[0].keys() != set(self.plan.names):
            raise WeightSyncError("the learner did not send all tensors of its plan")
        verify(sent[0], {actor.name: sums for actor, sums in zip(fleet.actors, received, strict=True)}, version=version)
        moved = time.perf_counter()
        await fleet.call_all("resume", version, seconds=seconds)
        ended = time.perf_counter()
        return {"pause": paused - started, "transfer": moved - paused, "total": ended - started}

    async def reset_reference(self) -> None:
        """Make the current policy the reference of the KL penalty."""
        await self._call_all("reset_reference")

    async def save(self, folder: Path) -> None:
        """Let all ranks copy their shards and begin to write them into `folder`; they may train on meanwhile."""
        await self._call_all("save", str(folder))

    async def saved(self) -> None:
        """Return when all ranks have written what `save` began.

        Asks again and again: a call that waited would keep a rank, which does one thing at a time, from training.
        """
        while not all(await self._call_all("saved")):
            await asyncio.sleep(_SAVED_EVERY_SECONDS)

    async def load(self, folder: Path) -> None:
        """Read the shards in `folder`."""
        await self._call_all("load", str(folder))

    async def export(self, folder: Path) -> None:
        """Write a `save_pretrained` folder."""
        await self._call_all("export", str(folder))

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        return list(await asyncio.gather(*(rank.call(method, *args) for rank in self._ranks)))

    async def close(self) -> None:
        """End all ranks."""
        await _close_all(self._ranks)


def _merge(results: Iterable[Mapping[str, float]], num_tokens: int) -> dict[str, float]:
    """Sums become means over trained tokens, maxima stay maxima, shared numbers come from the first rank.

    What all ranks computed in the seconds of the step becomes `tokens_per_second`, `model_flops_per_second` and, where
    the peak of their devices is known, `mfu`, the share of it.
    """
    sums: dict[str, float] = defaultdict(float)
    merged: dict[str, float] = {}
    for result in results:
        for name, value in result.items():
            if name.startswith("sum/"):
                sums[name.removeprefix("sum/")] += value
            elif name.startswith("max/"):
                key = f"{name.removeprefix('max/')}_max"
                merged[key] = max(merged.get(key, value), value)
            else:
                merged.setdefault(name, value)
    merged["tokens"] = sums.pop("tokens")
    merged["trained_tokens"] = sums.pop("trained_tokens")
    flops, peak_flops = sums.pop("flops", 0.0), sums.pop("peak_flops", 0.0)
    merged["tokens_per_second"] = merged["tokens"] / merged["seconds"]
    if flops:
        merged["model_flops_per_second"] = flops / merged["seconds"]
    if peak_flops:
        merged["mfu"] = flops / merged["seconds"] / peak_flops
    merged.update({name: value / num_tokens for name, value in sums.items()})
    return merged


def check_finite(metrics: Mapping[str, float], limit: int) -> None:
    """Stop a run whose gradients are no longer finite.

    Raises:
        TrainingStalledError: `limit` steps in a row were skipped.
    """
    if metrics["skipped_in_a_row"] >= limit:
        raise TrainingStalledError(
            f"{limit} steps in a row had no finite gradient; lower the learning rate (optimizer.lr) or look at the "
            "rewards of the last batches in the run's rollouts folder"
        )


async def _close_all(actors: list[Actor]) -> None:
    await asyncio.gather(*(actor.call("close", seconds=10.0) for actor in actors), return_exceptions=True)
    for actor in actors:
        actor.kill()
