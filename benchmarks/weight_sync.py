"""Publishing weights to running engines against a bare gloo broadcast of the same bytes, and what generation notices.

    python -m benchmarks.weight_sync

How the bytes alone travel on one host, by shared memory and otherwise, is `benchmarks.weight_ways`.

A model of about 100 million parameters in float32 (0.4 GB) is published by two FSDP2 ranks to one engine, then to two.

Ours: `LearnerGroup.publish`: freeze generation, gather each parameter from the ranks, sum it
up, write it into shared memory, in the engine sum it up, load it and repack the layers, compare the sums, resume. Bare:
processes with `torch.distributed.broadcast` of tensors of the same shapes, one after another (on gloo faster than one
large block), as many as ours has ends of the transfer (one sender, one for each engine); inside its time is nothing
else.

Then, with 64 greedy requests in flight in each engine, weights are published in the middle. A request is frozen so much
longer as it waits for its first token of the new weights than for its tokens on both sides of it; `beyond_transfer` is
that without the seconds in which weights travelled (medians of all requests).

`unproved` is ours without any sum, which says what the proof costs.

Checked: the same shapes on both sides; sums agree (ours: `publish` itself refuses otherwise; bare: after the clock);
every request in flight ends with all its tokens, carries both versions with one change between them, and, because the
published weights are the old ones, has the tokens of the undisturbed run.

Not comparable: bare does not gather shards, prove what arrived, or load it into a model. On GPUs the transfer is NCCL,
which behaves differently: nothing here says how fast that is.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.ours import config_for, problems
from rlsys import cluster, shared_weights, weights
from rlsys.actors.rollout import RolloutActor
from rlsys.actors.weights import WorkerExtension
from rlsys.chat import Chat
from rlsys.cluster import Actor, Demand
from rlsys.config import ChatConfig
from rlsys.fleet import RolloutFleet
from rlsys.learner_group import LearnerGroup
from rlsys.learners.fsdp import FsdpLearner
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.weights import WeightPlan

MODEL = ScratchModel(hidden_size=768, num_layers=14, num_heads=12, num_kv_heads=12, intermediate_size=2048)
SMALL = ScratchModel(hidden_size=128, num_layers=2)


def _only_copy(source: Tensor, target: Tensor) -> int:
    target.copy_(source)
    return 0


def _prove(on: bool) -> None:
    """Let this process sum up what it sends or receives, or not."""
    shared_weights.copy_and_checksum = weights.copy_and_checksum if on else _only_copy
    received = sys.modules.get("rlsys.actors.weights")
    if received is not None:
        received.checksum = weights.checksum if on else lambda _: 0  # type: ignore[attr-defined]


class ProvingLearner(FsdpLearner):
    """A learner that can leave the proof out."""

    def prove(self, on: bool) -> None:
        """Sum up what is sent, or not."""
        _prove(on)


class ProvingExtension(WorkerExtension):
    """The same for an engine's worker."""

    def prove(self, on: bool) -> None:
        """Sum up what is received, or not."""
        _prove(on)


class WatchedActor(RolloutActor):
    """A rollout actor that can also write down when each output of a request came."""

    async def prove(self, on: bool) -> None:
        """Let the engine sum up what it receives, or not."""
        await self._engine._llm.collective_rpc("prove", args=(on,))

    async def watch(self, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
        """Greedy completions of exactly `tokens` tokens: `tokens`, `versions`, and when each token came in `times`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, output_kind=RequestOutputKind.DELTA
        )
        self._written = [0] * len(prompts)

        async def one(index: int, prompt: list[int]) -> dict[str, Any]:
            ids: list[int] = []
            times: list[float] = []
            spans = None
            request = self._engine._llm.generate({"prompt_token_ids": prompt}, parameters, request_id=f"watch-{index}")
            async for output in request:
                ids += output.outputs[0].token_ids
                times += [time.perf_counter()] * (len(ids) - len(times))
                self._written[index] = len(ids)
                spans = output.outputs[0].weight_versions or spans
            versions = [(span.start, span.end, span.version) for span in spans or []]
            return {"tokens": ids, "times": times, "versions": versions}

        results = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
        self._written = [0]
        return results

    async def least_written(self) -> int:
        """Tokens of the request that has the fewest."""
        return min(getattr(self, "_written", [0]))


class BareEnd:
    """One end of a bare broadcast."""

    def start(self, address: tuple[str, int], rank: int, world_size: int, plan: WeightPlan) -> None:
        """Meet the others, make the tensors: numbers on rank 0, zeros elsewhere."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"tcp://{address[0]}:{address[1]}", rank=rank, world_size=world_size
        )
        make = torch.randn if rank == 0 else torch.zeros
        self._tensors = [make(shape, dtype=torch.float32) for shape in plan.shapes]

    def rendezvous(self) -> tuple[str, int]:
        """A free port of this machine."""
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]

    def broadcast(self) -> float:
        """Seconds from a barrier until everybody has everything."""
        import torch.distributed as dist

        dist.barrier()
        started = time.perf_counter()
        for tensor in self._tensors:
            dist.broadcast(tensor, src=0)
        dist.barrier()
        return time.perf_counter() - started

    def sums(self) -> list[float]:
        """One number for each tensor."""
        return [float(tensor.double().sum()) for tensor in self._tensors]


class Case:
    """Learner ranks, engines and bare ends, all alive; one works at a time."""

    def __init__(self, learners: LearnerGroup, fleet: RolloutFleet, bare: list[Actor]) -> None:
        self._learners, self._fleet, self._bare = learners, fleet, bare
        self._version = 0

    @classmethod
    async def start(cls, model: Path, *, engines: int, tokens: int) -> Case:
        """Start everything and let it meet."""
        config = config_for(
            model,
            max_response_tokens=tokens,
            max_model_tokens=tokens + 128,
            engines=engines,
            actor="benchmarks.weight_sync:WatchedActor",
        )
        options = {"worker_extension_cls": "benchmarks.weight_sync.ProvingExtension"}
        config = replace(
            config,
            actors=replace(config.actors, engine_options=options),
            learners=replace(config.learners, use="benchmarks.weight_sync:ProvingLearner"),
        )
        fleet, learners = await asyncio.gather(
            RolloutFleet.start(config, str(model)),
            LearnerGroup.start(config, str(model), optimizer=config.rl.optimizer, total_steps=1, loss=config.rl.loss),
        )
        learners.serve(fleet)
        demand = Demand(what="bare end", count=1 + engines)
        ends = cluster.place(BareEnd, demand, [{}] * demand.count, call_seconds=300)
        address = await ends[0].call("rendezvous")
        starts = (end.call("start", address, rank, len(ends), learners.plan) for rank, end in enumerate(ends))
        await asyncio.gather(*starts)
        return cls(learners, fleet, ends)

    @property
    def num_bytes(self) -> int:
        """Bytes of one set of weights."""
        return sum(4 * int(np.prod(shape)) for shape in self._learners.plan.shapes)

    async def publish(self) -> Sample:
        """One publication to idle engines."""
        self._version += 1
        took = await self._learners.publish(self._fleet, self._version)
        return {"seconds": took["total"], "pause": took["pause"], "transfer": took["transfer"]}

    async def publish_unproved(self) -> Sample:
        """The same without sums."""
        await self._prove(False)
        try:
            return await self.publish()
        finally:
            await self._prove(True)

    async def _prove(self, on: bool) -> None:
        ranks = (rank.call("prove", on) for rank in self._learners._ranks)
        await asyncio.gather(*ranks, self._fleet.call_all("prove", on, seconds=60))

    async def broadcast(self) -> Sample:
        """One bare broadcast."""
        return {"seconds": max(await asyncio.gather(*(end.call("broadcast") for end in self._bare)))}

    async def check_bare(self) -> None:
        """All ends hold the same numbers."""
        sums = await asyncio.gather(*(end.call("sums") for end in self._bare))
        must(all(other == sums[0] for other in sums[1:]), "the bare broadcast did not arrive whole")

    async def watched(self, prompts: list[list[int]], tokens: int, *, update_after: int | None) -> dict[str, Any]:
        """All prompts in every engine; after so many tokens of each request new weights are published."""
        watching = asyncio.create_task(self._fleet.call_all("watch", prompts, tokens, seconds=600))
        took: Mapping[str, float] = {}
        if update_after is not None:
            while min(await self._fleet.call_all("least_written", seconds=60)) < update_after:
                must(not watching.done(), "the requests ended before the update; give more --tokens")
                await asyncio.sleep(0.02)
            took = await self.publish()
        reports = [report for engine in await watching for report in engine]
        return {"reports": reports, "publish": dict(took)}

    async def close(self) -> None:
        """End all processes of this case."""
        for end in self._bare:
            end.kill()
        await asyncio.gather(self._learners.close(), self._fleet.close())


async def in_flight(case: Case, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """What an update in the middle costs; no request may lose anything."""
    still = await case.watched(prompts, tokens, update_after=None)
    moved = await case.watched(prompts, tokens, update_after=tokens // 4)
    equal, frozen = 0, []
    for undisturbed, report in zip(still["reports"], moved["reports"], strict=True):
        spans = report["versions"]
        must(len(report["tokens"]) == tokens, f"a request in flight ended with {len(report['tokens'])} of {tokens}")
        must(len(spans) == 2, f"a request in flight has the versions {spans}, not an old and a new one")
        must(spans[0][1] == spans[1][0] and spans[1][1] == tokens, f"versions do not cover all tokens: {spans}")
        must(int(spans[1][2]) == int(spans[0][2]) + 1, f"versions are not successive: {spans}")
        equal += report["tokens"] == undisturbed["tokens"]
        gaps, change = np.diff(report["times"]), spans[1][0] - 1  # gaps[change]: before the first new token
        around = [*gaps[max(1, change - 4) : change], *gaps[change + 1 : change + 5]]
        frozen.append(float(gaps[change] - np.median(around)))
    must(equal >= 0.9 * len(frozen), f"only {equal} of {len(frozen)} requests wrote what they write without an update")
    took = moved["publish"]
    return {
        "seconds": float(np.median(frozen)),
        "transfer": took["transfer"],
        "beyond_transfer": float(np.median(frozen)) - took["transfer"],
        "publish": took["seconds"],
        "requests": len(frozen),
        "equal_requests": equal,
    }


async def run_case(model: Path, engines: int, options: Any) -> dict[str, Any]:
    """All measurements with so many engines."""
    case = await Case.start(model, engines=engines, tokens=options.tokens)
    try:
        say(f"{engines} engine(s), {case.num_bytes / 1e9:.3f} GB")
        for _ in range(2):
            await case.publish()
            await case.broadcast()
        await case.check_bare()
        sides = {"publish": case.publish, "unproved": case.publish_unproved, "bare": case.broadcast}
        samples = await common.race(sides, rounds=options.rounds, settle_seconds=options.settle)
        chat = Chat.load(str(model), [], ChatConfig())
        prompts = [chat.render(problem) for problem in problems(options.requests)]
        await case.watched(prompts, options.tokens, update_after=None)
        samples["in_flight"] = []
        for _ in range(options.flight_rounds):
            await common.settle(options.settle)
            samples["in_flight"].append(await in_flight(case, prompts, options.tokens))
        found = common.ratios(samples["publish"], samples["bare"])
        proof = common.ratios(samples["publish"], samples["unproved"])
        rate = case.num_bytes / 1e9 / common.median(samples["publish"])
    finally:
        await case.close()
    split = ", ".join(f"{part} {common.median(samples['publish'], part):.3f}" for part in ("pause", "transfer"))
    say(
        f"publish {common.median(samples['publish']):.3f} s ({split}), {rate:.2f} GB/s to each; "
        f"bare {common.median(samples['bare']):.3f} s"
    )
    common.show(f"time to {engines} engine(s), publish / bare broadcast", found)
    common.show("publish / publish without sums", proof, "at most 1.05")
    flights = samples["in_flight"]
    say(
        f"{flights[0]['requests']} requests in flight: frozen for {common.median(flights):.3f} s, the transfer took "
        f"{common.median(flights, 'transfer'):.3f} s, {1000 * common.median(flights, 'beyond_transfer'):.0f} ms more "
        "(target at most 20 ms); no token lost, both versions on every request"
    )
    return {
        "bytes": case.num_bytes,
        "ratios": {"publish_to_bare": found, "publish_to_unproved": proof},
        "samples": samples,
    }


async def main() -> None:
    """One engine, then two."""
    parser = common.arguments(__doc__)
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--requests", type=int, default=64, help="requests in flight in each engine")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each request in flight")
    parser.add_argument("--flight-rounds", type=int, default=3, help="updates with requests in flight")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a quick trial")
    options = parser.parse_args()
    common.set_threads()
    folder = Path(tempfile.mkdtemp(prefix="weight_sync_"))
    model = build_scratch_model(folder / "model", SMALL if options.small else MODEL)
    config = config_for(model, max_response_tokens=1, max_model_tokens=256)
    cluster.connect(config.cluster)
    try:
        cases = {str(engines): await run_case(model, engines, options) for engines in options.engines}
    finally:
        cluster.disconnect()
    common.write("weight_sync", options, {"engines": cases})
    shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(main())
