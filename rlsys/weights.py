"""What both ends of a weight transfer must agree on: the plan, the gloo group, the checksum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.errors import WeightSyncError

GLOO_BACKEND = "rlsys_gloo"
NCCL_BACKEND = "rlsys_nccl"


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


def join_gloo_group(group: WeightGroup, *, rank: int, seconds: float) -> dist.ProcessGroup:
    """Meet the others, apart from whatever default process group this process has; collectives time out after `seconds`."""
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(
        group.master_address, group.master_port, group.world_size, is_master=rank == 0, timeout=timeout
    )
    return dist.ProcessGroupGloo(dist.PrefixStore("rlsys-weights", store), rank, group.world_size, timeout)


def broadcast(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Send (rank 0) or receive one contiguous tensor, as bytes because gloo does not know every number format."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of the bytes that also sees swapped blocks; two passes at memory speed, on any device.

    The bytes are laid out as a table of 64-bit words; column and row sums are weighted by their positions, modulo 2^64.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = data[:whole].clone().view(torch.int64) if data.data_ptr() % 8 else data[:whole].view(torch.int64)
    width = 1024
    rows = words.numel() // width
    table, rest = words[: rows * width].view(rows, width), words[rows * width :]
    total = _weighted(table.sum(0)) + 0x9E3779B1 * _weighted(table.sum(1)) + 0x85EBCA77 * _weighted(rest)
    total += 0xC2B2AE3D * _weighted(data[whole:].to(torch.int64)) + data.numel()
    return int(total) & 0xFFFFFFFFFFFFFFFF


def _weighted(values: Tensor) -> int:
    return int((values * torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.int64)).sum())


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
