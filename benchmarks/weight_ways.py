"""The ways that 0.78 GB of weights can take from one process to others of the same host, one against the other.

    python -m benchmarks.weight_ways
    python -m benchmarks.weight_ways --load

A sender has the tensors of a model of 195 million parameters in float32, 137 of them; one receiver, then two, have a
model of the same shapes. The clock runs from the word to send until every receiver has all of it at hand, as tensors
that an engine can load; with `--load`, until each has also copied all of it into its model.

* `shared`: ours. The sender writes each tensor into shared memory and sums it up; receivers follow it from tensor to
  tensor, sum up and load from there.
* `gloo`: ours where learner and engines are on several hosts: one broadcast for each tensor, summed up at both ends.
* `file`: `torch.save` of a dictionary into the folder for temporary files, `torch.load` of it.
* `list`: Ray's object store with the list of tensors, put once and fetched by each receiver.
* `flat`: Ray's object store with one flat numpy array, of which receivers copy views: what Ray does best.
* `unproved`: `shared` without any checksum, which says what the proof costs.

Every transfer sends other numbers, and after the clock the sums of all receivers are compared with the sender's. Not in
it: gathering shards, vLLM's loading, comparing sums. Only `shared` and `gloo` prove anything within their time.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Sample, must, say
from rlsys import cluster, shared_weights
from rlsys.actors import receivers
from rlsys.cluster import Actor, Demand
from rlsys.config import ClusterConfig
from rlsys.learners import sender
from rlsys.learners.host import keep_freed_memory
from rlsys.shared_weights import SharedWriter
from rlsys.weights import GLOO_BACKEND, WeightGroup, WeightPlan, checksum, join_gloo_group

WAYS = ("shared", "unproved", "gloo", "file", "list", "flat")
_SECONDS = 300.0


def plan_of(hidden: int, layers: int) -> WeightPlan:
    """The shapes of a model with so many layers of this width."""
    inner = 11 * hidden // 4
    layer = [[hidden, hidden]] * 4 + [[inner, hidden], [inner, hidden], [hidden, inner], [hidden], [hidden]]
    shapes = [[2048, hidden], *layer * layers, [hidden]]
    return WeightPlan(
        names=[f"weight.{number}" for number in range(len(shapes))],
        dtype_names=["float32"] * len(shapes),
        shapes=shapes,
    )


class _End:
    """What sender and receivers have in common: a model."""

    def start(self, plan: WeightPlan) -> None:
        """Make the model, all ones."""
        torch.set_num_threads(1)
        keep_freed_memory()
        self._plan = plan
        self._tensors = {name: torch.ones(shape) for name, shape in zip(plan.names, plan.shapes, strict=True)}


class SendingEnd(_End):
    """The learner's part."""

    def rendezvous(self) -> tuple[str, int]:
        """A free port of this machine."""
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return "127.0.0.1", probe.getsockname()[1]

    def open(self, shared: WeightGroup, gloo: WeightGroup) -> None:
        """Meet the receivers for both ways of ours."""
        memory = SharedWriter(self._plan)
        self._shared = sender.open_sender(
            GLOO_BACKEND, shared, seconds=_SECONDS, device=torch.device("cpu"), memory=memory
        )
        must(isinstance(self._shared, sender.SharedSender), "the receivers did not take the shared memory")
        self._gloo = sender.GlooSender(join_gloo_group(gloo, rank=0, seconds=_SECONDS))

    def change(self, number: int) -> dict[str, int]:
        """Take other numbers; returns their checksums."""
        for tensor in self._tensors.values():
            tensor.fill_(1.0 + number / 64)
            tensor.view(-1)[:: tensor.numel() // 7 + 1] += number
        return {name: checksum(tensor) for name, tensor in self._tensors.items()}

    def send(self, way: str, path: str) -> Any:
        """Do the sender's part; returns what the receivers need to be told."""
        if way in ("shared", "unproved"):
            _without_sums(lambda: self._shared.send(self._tensors.items()), way == "unproved")
        elif way == "gloo":
            self._gloo.send(self._tensors.items())
        elif way == "file":
            torch.save(self._tensors, path)
        elif way == "list":
            return [cluster.put(list(self._tensors.values()))]
        elif way == "flat":
            return [cluster.put(torch.cat([tensor.view(-1) for tensor in self._tensors.values()]).numpy())]
        return []


class ReceivingEnd(_End):
    """An engine's part, with a bare copy in the place of loading."""

    def open(self, shared: WeightGroup, gloo: WeightGroup, rank: int) -> None:
        """Meet the sender for both ways of ours."""
        self._shared = receivers.open_receiver(shared, rank=rank, seconds=_SECONDS)
        self._gloo = receivers.GlooReceiver(join_gloo_group(gloo, rank=rank, seconds=_SECONDS), _SECONDS)

    def receive(self, way: str, load: bool, path: str, given: Any = None) -> None:
        """Do a receiver's part: afterwards it holds the sender's tensors, or its model has their numbers."""
        self._load = load
        if way in ("shared", "unproved", "gloo"):
            transfer = self._gloo if way == "gloo" else self._shared
            self._proved(transfer.receive(self._plan), with_sums=way != "unproved")
        else:
            self._take(zip(self._plan.names, _tensors_of(way, path, given, self._plan), strict=True))

    def sums(self) -> dict[str, int]:
        """The checksum of every tensor that was received."""
        held, self._held = self._held, {}
        return {name: checksum(tensor) for name, tensor in held.items()}

    def _take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._held = self._tensors if self._load else {}
        for name, tensor in tensors:
            if self._load:
                self._tensors[name].copy_(tensor)
            else:
                self._held[name] = tensor

    def _proved(self, tensors: Iterator[tuple[str, Tensor]], *, with_sums: bool) -> None:
        """As the engine does it: while one tensor is loaded, the one before is summed up."""
        with ThreadPoolExecutor(1) as thread:

            def summed() -> Iterator[tuple[str, Tensor]]:
                for name, tensor in tensors:
                    if with_sums:
                        thread.submit(checksum, tensor)
                    yield name, tensor

            self._take(summed())


def _tensors_of(way: str, path: str, given: Any, plan: WeightPlan) -> Iterable[Tensor]:
    if way == "file":
        loaded: dict[str, Tensor] = torch.load(path)
        return loaded.values()
    if way == "list":
        tensors: list[Tensor] = given
        return tensors
    ends = np.cumsum([int(np.prod(shape)) for shape in plan.shapes])
    parts = np.split(given, ends[:-1])
    return [torch.from_numpy(part).view(shape) for part, shape in zip(parts, plan.shapes, strict=True)]


def _without_sums(send: Callable[[], Any], without: bool) -> None:
    if not without:
        send()
        return
    shared_weights.copy_and_checksum, kept = _only_copy, shared_weights.copy_and_checksum
    try:
        send()
    finally:
        shared_weights.copy_and_checksum = kept


def _only_copy(source: Tensor, target: Tensor) -> int:
    target.copy_(source)
    return 0


class Case:
    """A sender and its receivers, all alive; one transfer at a time."""

    def __init__(self, sending: Actor, receiving: list[Actor], folder: Path, load: bool) -> None:
        self._sending, self._receiving, self._load = sending, receiving, load
        self._path = str(folder / "weights.pt")
        self._number = 0

    @classmethod
    async def start(cls, plan: WeightPlan, num_receivers: int, folder: Path, *, load: bool) -> Case:
        """Place everybody and let them meet."""
        [one] = cluster.place(SendingEnd, Demand(what="sender", count=1), [{}], call_seconds=_SECONDS)
        demand = Demand(what="receiver", count=num_receivers)
        others = cluster.place(ReceivingEnd, demand, [{}] * num_receivers, call_seconds=_SECONDS)
        await asyncio.gather(*(end.call("start", plan) for end in (one, *others)))
        groups = []
        for _ in range(2):
            address, port = await one.call("rendezvous")
            groups.append(WeightGroup(master_address=address, master_port=port, world_size=1 + num_receivers))
        opening = (other.call("open", *groups, rank) for rank, other in enumerate(others, 1))
        await asyncio.gather(one.call("open", *groups), *opening)
        return cls(one, others, folder, load)

    async def transfer(self, way: str) -> Sample:
        """Other weights from the sender to all receivers, and the proof that they have them."""
        self._number += 1
        expected = await self._sending.call("change", self._number)
        together = way in ("shared", "unproved", "gloo")  # with others nothing can be received before all is sent
        started = time.perf_counter()
        sending = asyncio.create_task(self._sending.call("send", way, self._path))
        given = () if together else await sending
        receiving = (end.call("receive", way, self._load, self._path, *given) for end in self._receiving)
        await asyncio.gather(sending, *receiving)
        seconds = time.perf_counter() - started
        for sums in await asyncio.gather(*(end.call("sums") for end in self._receiving)):
            must(sums == expected, f"by {way!r} other weights arrived than were sent")
        return {"seconds": seconds}

    def close(self) -> None:
        """End all processes."""
        for end in (self._sending, *self._receiving):
            end.kill()


async def run_case(plan: WeightPlan, num_receivers: int, options: Any, folder: Path) -> dict[str, Any]:
    """All ways with so many receivers."""
    num_bytes = sum(4 * int(np.prod(shape)) for shape in plan.shapes)
    say(f"{num_bytes / 1e9:.3f} GB to {num_receivers} receiver(s)")
    case = await Case.start(plan, num_receivers, folder, load=options.load)

    def side(way: str) -> Callable[[], Any]:
        return lambda: case.transfer(way)

    try:
        for way in WAYS * 2:  # both blocks of shared memory, and the page cache
            await case.transfer(way)
        samples = await common.race(
            {way: side(way) for way in WAYS}, rounds=options.rounds, settle_seconds=options.settle
        )
    finally:
        case.close()
    for way in WAYS:
        rate = num_bytes / 1e9 / common.median(samples[way])
        say(f"{way:<9} {common.median(samples[way]):.3f} s, {rate:.2f} GB/s to each")
    targets = {"file": "at least 8", "list": "at least 15"}
    found = {way: common.ratios(samples[way], samples["shared"]) for way in WAYS if way != "shared"}
    for way, ratio in found.items():
        common.show(f"time to {num_receivers} receiver(s), {way} / shared", ratio, targets.get(way, ""))
    return {"bytes": num_bytes, "ratios_to_shared": found, "samples": samples}


async def main() -> None:
    """One receiver, then two."""
    parser = common.arguments(__doc__)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--load", action="store_true", help="the clock ends when all is copied into a model")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a quick trial")
    options = parser.parse_args()
    common.set_threads()
    plan = plan_of(128, 2) if options.small else plan_of(1024, 15)
    cluster.connect(ClusterConfig())
    try:
        with tempfile.TemporaryDirectory(prefix="weight_ways_") as folder:
            cases = {str(count): await run_case(plan, count, options, Path(folder)) for count in options.receivers}
    finally:
        cluster.disconnect()
    common.write("weight_ways_loaded" if options.load else "weight_ways", options, {"receivers": cases})


if __name__ == "__main__":
    asyncio.run(main())
