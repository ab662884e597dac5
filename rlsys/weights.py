"""What both ends of a weight transfer must agree on: the plan, the gloo group, the checksum."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import xxhash
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import BroadcastOptions, ProcessGroupGloo

from rlsys.errors import WeightSyncError

GLOO_BACKEND = "rlsys_gloo"
NCCL_BACKEND = "rlsys_nccl"

T = TypeVar("T")

_GRACE_SECONDS = 2.0
_PART_BYTES = 1 << 18
_TABLE_WIDTH = 1021  # a prime: rows and columns of a weight matrix never line up with those of the checksum's table


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """Names, number formats and shapes of the tensors, in the order in which they are sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGroup:
    """Where sender (rank 0) and receivers meet; `world_size` counts them all."""

    master_address: str
    master_port: int
    world_size: int


def join_gloo_group(group: WeightGroup, *, rank: int, seconds: float) -> ProcessGroupGloo:
    """Meet the others, apart from any default process group that this process has; who joins so knows only gloo.

    Collectives time out after `seconds`.

    Raises:
        WeightSyncError: not all came within `seconds`.
    """

    def join() -> ProcessGroupGloo:
        store = open_store(group, rank=rank, seconds=seconds)
        if rank == 0:
            store.set(OFFER_KEY, "null")
        else:
            store.set(answer_key(rank), "no")
        return gloo_group(store, group, rank=rank, seconds=seconds)

    return within(seconds, join)


OFFER_KEY = "offer"


def answer_key(rank: int) -> str:
    """Where a receiver says in the store whether it takes the sender's offer."""
    return f"answer/{rank}"


def open_store(group: WeightGroup, *, rank: int, seconds: float) -> TCPStore:
    """The table that the members of a group share while they meet; it is in the sender's process."""
    timeout = timedelta(seconds=seconds)
    return TCPStore(group.master_address, group.master_port, group.world_size, is_master=rank == 0, timeout=timeout)


def gloo_group(store: TCPStore, group: WeightGroup, *, rank: int, seconds: float) -> ProcessGroupGloo:
    """The group of those who have met in a store."""
    return ProcessGroupGloo(PrefixStore("rlsys-weights", store), rank, group.world_size, timedelta(seconds=seconds))


def within(seconds: float, meet: Callable[[], T]) -> T:
    """What `meet` returns, which has this deadline of its own; but a store whose process is frozen does not keep it.

    Raises:
        WeightSyncError: it failed, or did not return though its time was up.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(meet())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="rlsys-weights-meet").start()
    try:
        return result.result(timeout=seconds + _GRACE_SECONDS)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "somebody did not come"
        raise WeightSyncError(f"learner and engines did not meet within {seconds:g} s: {reason}") from error


def broadcast(tensor: Tensor, group: ProcessGroupGloo) -> None:
    """Send (rank 0) or receive one contiguous tensor, as bytes because gloo does not know every number format."""
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()  # type: ignore[attr-defined]


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of the bytes in their order, at the speed of the memory: XXH3, on GPUs `table_checksum`.

    Both ends of a transfer have their tensors on the same kind of device.
    """
    if tensor.device.type != "cpu":
        return table_checksum(tensor)
    return xxhash.xxh3_64_intdigest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def copy_and_checksum(source: Tensor, target: Tensor) -> int:
    """Copy into `target`, which is on a CPU; returns its checksum.

    Between CPUs it goes part by part, so that each is summed up from the processor's cache.
    """
    plain = source.is_contiguous() and target.is_contiguous() and source.device.type == "cpu"
    if not plain or source.dtype != target.dtype or source.shape != target.shape or not source.numel():
        target.copy_(source)
        return checksum(target)
    read, written = (tensor.detach().view(-1).view(torch.uint8).numpy() for tensor in (source, target))
    sums = xxhash.xxh3_64()
    for begin in range(0, read.size, _PART_BYTES):
        part = written[begin : begin + _PART_BYTES]
        part[:] = read[begin : begin + _PART_BYTES]
        sums.update(part.data)
    return sums.intdigest()


def table_checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of the bytes that also sees swapped blocks; two passes at memory speed, on any device.

    The bytes are laid out as a table of 64-bit words. Its column sums, its row sums and what does not fill a row are
    scrambled, each with its position, and added up, all modulo 2^64. Sums that were only weighted by their positions
    would lose the topmost bits, which are signs of numbers.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    aligned = data.data_ptr() % 8 == 0 and data.storage_offset() % 8 == 0
    words = (data[:whole] if aligned else data[:whole].clone()).view(torch.int64)
    in_table = words.numel() // _TABLE_WIDTH * _TABLE_WIDTH
    table, rest = words[:in_table].view(-1, _TABLE_WIDTH), words[in_table:]
    size = torch.tensor([data.numel()], device=data.device)
    parts = torch.cat([size, table.sum(0), table.sum(1), rest, data[whole:].to(torch.int64)])
    position = torch.arange(parts.numel(), device=data.device, dtype=torch.int64)
    return int(_scrambled(parts + position * 0x1E3779B97F4A7C15).sum()) & 0xFFFFFFFFFFFFFFFF


def _scrambled(values: Tensor) -> Tensor:
    """A one-to-one map of 64-bit words in which every bit depends on every other (SplitMix64)."""
    values = (values ^ _shifted(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shifted(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's own drags the sign along."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def verify(sent: Mapping[str, int], received: Mapping[str, Mapping[str, int]], *, version: int) -> None:
    """Compare the checksums of the sender with those of every engine.

    Raises:
        WeightSyncError: names the first engine and tensor that disagree.
    """
    for engine, checksums in received.items():
        for name, value in sent.items():
            if name not in checksums:
                raise WeightSyncError(f"{engine} did not receive {name} of weights version {version}")
            if checksums[name] != value:
                raise WeightSyncError(
                    f"{engine} holds a different {name} than the learner sent as version {version} (checksum "
                    f"{checksums[name]:016x}, expected {value:016x}); generation is stopped"
                )
        extra = checksums.keys() - sent.keys()
        if extra:
            raise WeightSyncError(f"{engine} received {sorted(extra)[0]}, which the learner did not send")
