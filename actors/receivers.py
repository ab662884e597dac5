"""The engine's end of the weight transfer between CPUs, whatever the engine: shared memory or gloo."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroupGloo

from rlsys.errors import WeightSyncError
from rlsys.shared_weights import SharedPlace, SharedReader
from rlsys.weight_meeting import accept_weights
from rlsys.weights import WeightGroup, WeightPlan, broadcast


class WeightReceiver(Protocol):
    """Receives what the learner sends, once for each time that it sends."""

    def receive(self, plan: WeightPlan) -> Iterator[tuple[str, Tensor]]: ...

    def close(self) -> None: ...


def open_receiver(group: WeightGroup, *, rank: int, seconds: float) -> WeightReceiver:
    """Join the learner's group as `rank`; a transfer that takes longer than `seconds` fails."""
    found = accept_weights(group, rank=rank, seconds=seconds)
    return GlooReceiver(found, seconds) if isinstance(found, ProcessGroupGloo) else SharedReceiver(*found, seconds)


class SharedReceiver:
    """Reads each set of weights where the learner on this host has written it; see `SharedReader.read`."""

    def __init__(self, reader: SharedReader, coming: SharedPlace, seconds: float) -> None:
        self._reader: SharedReader | None = reader
        self._serial = coming.serial
        self._seconds = seconds

    def receive(self, plan: WeightPlan) -> Iterator[tuple[str, Tensor]]:
        assert self._reader is not None
        serial = self._serial
        self._serial += 1
        return self._reader.read(serial, plan, seconds=self._seconds)

    def close(self) -> None:
        self._reader = None


class GlooReceiver:
    """One broadcast for each tensor of the plan."""

    def __init__(self, group: ProcessGroupGloo, seconds: float) -> None:
        self._group = group
        self._seconds = seconds

    def receive(self, plan: WeightPlan) -> Iterator[tuple[str, Tensor]]:
        until = time.monotonic() + self._seconds
        for name, dtype_name, shape in zip(plan.names, plan.dtype_names, plan.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype_name))
            broadcast(tensor, self._group)
            if time.monotonic() > until:
                raise WeightSyncError(f"the weights did not all come within {self._seconds:g} s; {name} was the last")
            yield name, tensor

    def close(self) -> None:
        self._group.abort()
