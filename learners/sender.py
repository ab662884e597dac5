"""The learner's end of the weight transfer: shared memory or gloo between CPUs, packed NCCL broadcast between GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroupGloo

from rlsys.shared_weights import SharedWriter
from rlsys.weight_meeting import offer_weights
from rlsys.weights import GLOO_BACKEND, NCCL_BACKEND, WeightGroup, broadcast, checksum


class WeightSender(Protocol):
    """Sends named tensors to every engine and says what it sent."""

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]: ...

    def close(self) -> None: ...


def open_sender(
    backend: str, group: WeightGroup, *, seconds: float, device: torch.device, memory: SharedWriter | None = None
) -> WeightSender:
    """Join the group as its sender, rank 0; engines of `GLOO_BACKEND` may read from `memory`, if all of them can."""
    if backend == GLOO_BACKEND:
        gloo = offer_weights(group, None if memory is None else memory.coming, seconds=seconds)
        if gloo is not None:
            return GlooSender(gloo)
        assert memory is not None
        return SharedSender(memory)
    if backend == NCCL_BACKEND:
        return NcclSender(group, device=device)
    raise ValueError(f"unknown weight transfer {backend!r}; known: {GLOO_BACKEND}, {NCCL_BACKEND}")


class SharedSender:
    """Writes into memory that all engines of this host read; it waits for none of them."""

    def __init__(self, memory: SharedWriter) -> None:
        memory.reserve()
        self._memory = memory

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        with self._memory.writing() as put:
            return _one_ahead(tensors, put)

    def close(self) -> None:
        self._memory.withdraw()


class GlooSender:
    """One broadcast for each tensor: on gloo that is faster than large buckets."""

    def __init__(self, group: ProcessGroupGloo) -> None:
        self._group = group

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        def write(_name: str, tensor: Tensor) -> int:
            on_cpu = tensor.cpu()
            broadcast(on_cpu, self._group)
            return checksum(on_cpu)

        return _one_ahead(tensors, write)

    def close(self) -> None:
        self._group.abort()


def _one_ahead(tensors: Iterable[tuple[str, Tensor]], write: Callable[[str, Tensor], int]) -> dict[str, int]:
    """What `write` returns for each tensor, while the next is being gathered from the ranks."""
    found: dict[str, int] = {}
    under_way: tuple[str, Future[int]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="rlsys-weights-send") as thread:
        for name, tensor in tensors:
            if under_way is not None:
                found[under_way[0]] = under_way[1].result()
            under_way = name, thread.submit(write, name, tensor)
        if under_way is not None:
            found[under_way[0]] = under_way[1].result()
    return found


class NcclSender:
    """vLLM's packed broadcast, as its `nccl` engine expects it."""

    def __init__(self, group: WeightGroup, *, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        self._group = stateless_init_process_group(group.master_address, group.master_port, 0, group.world_size, device)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        from vllm.distributed.weight_transfer.packed_tensor import (
            DEFAULT_PACKED_BUFFER_SIZE_BYTES,
            DEFAULT_PACKED_NUM_BUFFERS,
            packed_nccl_broadcast_producer,
        )

        checksums: dict[str, int] = {}

        def checked() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                checksums[name] = checksum(tensor)
                yield name, tensor

        def tensor_of(item: Any) -> Tensor:
            assert isinstance(item[1], Tensor)
            return item[1]

        packed_nccl_broadcast_producer(
            iterator=checked(),
            group=self._group,
            src=0,
            post_iter_func=tensor_of,
            buffer_size_bytes=DEFAULT_PACKED_BUFFER_SIZE_BYTES,
            num_buffers=DEFAULT_PACKED_NUM_BUFFERS,
        )
        torch.cuda.current_stream().synchronize()
        return checksums

    def close(self) -> None:
        self._group.destroy()
