"""The driver's view of the learner ranks: placed, given their shares of a batch, asked for weights, saved, ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys import cluster
from rlsys.cluster import Actor, Demand
from rlsys.config import Config, OptimizerConfig
from rlsys.errors import ActorDiedError, ActorTimeoutError, LearnerLostError, RlsysError, TrainingStalledError
from rlsys.fleet import RolloutFleet
from rlsys.packing import MicroBatch, shard, unpack
from rlsys.plugins import resolve
from rlsys.types import NetworkKind, TrainBatch
from rlsys.weight_sync import WeightSync, serve_newcomers
from rlsys.weights import WeightPlan
from rlsys.worker_life import CLOSE_SECONDS

_SAVED_EVERY_SECONDS = 0.2
"""How often the ranks are asked whether a checkpoint is written."""
_NEWS_SECONDS = 30.0
"""So long after a rank raised it may turn out that another one had died: news of a node that is gone takes seconds."""


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


class LearnerGroup:
    """The learner ranks as one learner."""

    def __init__(self, ranks: list[Actor], plan: WeightPlan, config: Config) -> None:
        self._ranks = ranks
        self._config = config
        self._sync: WeightSync | None = None
        self._fleet: RolloutFleet | None = None
        self._newcomers: asyncio.Task[None] | None = None
        self.plan = plan
        self.at_rest = asyncio.Lock()
        """Held while weights change or travel."""
        self.is_ahead = True
        """Whether the weights are others than those that were published last."""

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
        keywords = {
            "optimizer": optimizer,
            "total_steps": total_steps,
            "loss": resolve(loss, place="loss") if isinstance(loss, str) else loss,
            "with_reference": with_reference,
            "network": network,
            "timeout": seconds,
        }
        try:
            [master] = await _together([ranks[0].call("rendezvous", seconds=seconds)])
            plans = await _together(rank.call("start", seconds=seconds, master=master, **keywords) for rank in ranks)
        except BaseException:
            for rank in ranks:  # else they keep their places for as long as anybody holds the error
                rank.kill()
            raise
        return cls(ranks, plans[0], config)

    async def step(self, batch: TrainBatch, *, temperature: float, **loss_options: Any) -> dict[str, float]:
        """One optimizer step; returns means over trained tokens, the gradient norm and the seconds it took."""
        shares = self._to_ranks(self._shares(batch))
        async with self.at_rest:
            self.is_ahead = True
            results = await _together(
                rank.call("step", share, num_tokens=batch.num_tokens, temperature=temperature, **loss_options)
                for rank, share in zip(self._ranks, shares, strict=True)
            )
        return _merge(results, batch.num_tokens)

    async def infer(
        self, batch: TrainBatch, *, temperature: float, reference: bool = False
    ) -> list[NDArray[np.float32]]:
        """What the network says of the trained tokens: one array [T] for each rollout, 0 where none trains.

        Log-probs of the policy or, with `reference`, of the frozen one; of a critic, values.
        """
        shares = self._shares(batch)
        results = await _together(
            rank.call("infer", share, temperature=temperature, reference=reference)
            for rank, share in zip(self._ranks, self._to_ranks(shares), strict=True)
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

    def serve(self, fleet: RolloutFleet) -> None:
        """From now on these workers hold this learner's weights: those that join get what was published last."""
        self._fleet, fleet.follows_learner = fleet, True
        self._sync = WeightSync(self._ranks, self.plan, fleet, self._config.actors)
        self._newcomers = asyncio.create_task(serve_newcomers(self._sync, fleet, self))

    async def publish(self, fleet: RolloutFleet, version: int) -> dict[str, float]:
        """Give every worker the current weights and prove that they arrived; then they are `version`.

        Generation is frozen, not aborted. Who has not proved the weights stays frozen. Returns the seconds it took.

        Raises:
            WeightSyncError, ActorError: they did not arrive, tried again and again; names worker and tensor.
            FleetLostError: there is no worker to give them to, and none came.
            LearnerLostError: a rank died or hangs.
        """
        assert self._sync is not None, "serve comes first"
        async with self.at_rest:
            seconds = await self._sync.publish(lambda: fleet.receivers, version)
            self.is_ahead = False
        fleet.bell.ring()
        return seconds

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
        self.is_ahead = True
        await self._call_all("load", str(folder))

    async def export(self, folder: Path) -> None:
        """Write a `save_pretrained` folder."""
        await self._call_all("export", str(folder))

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        return await _together(rank.call(method, *args) for rank in self._ranks)

    async def close(self) -> None:
        """End all ranks, politely first; workers that join later get no weights."""
        if self._newcomers is not None:
            self._newcomers.cancel()
            await asyncio.gather(self._newcomers, return_exceptions=True)
        if self._fleet is not None:
            self._fleet.follows_learner = False
        closing = (rank.call("close", seconds=CLOSE_SECONDS) for rank in self._ranks)
        await asyncio.gather(*closing, return_exceptions=True)
        for rank in self._ranks:
            rank.kill()


async def _together(calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """What calls to all ranks give.

    Where a rank dies in the middle of a collective the others raise, and that may be heard of before the death.

    Raises:
        LearnerLostError: a rank died or did not answer; the others, which wait for it, cannot go on.
        RlsysError: a rank raised, and none died of it or before.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    clock = asyncio.get_running_loop().time
    failure: RlsysError | None = None
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as patience:
                for call in asyncio.as_completed(tasks):
                    try:
                        await call
                    except (ActorDiedError, ActorTimeoutError) as error:
                        raise LearnerLostError(f"the learner cannot go on: {error}") from error
                    except RlsysError as error:
                        if failure is None:
                            failure = error
                            patience.reschedule(clock() + _NEWS_SECONDS)
        if failure is not None:
            raise failure
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
