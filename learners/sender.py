"""The learner's end of the weight transfer: gloo between CPUs, vLLM's packed NCCL broadcast between GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from rlsys.weights import GLOO_BACKEND, NCCL_BACKEND, WeightGroup, broadcast, checksum, join_gloo_group


class WeightSender(Protocol):
    """Sends named tensors to every engine and says what it sent."""

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]: ...

    def close(self) -> None: ...


def open_sender(backend: str, group: WeightGroup, *, seconds: float, device: torch.device) -> WeightSender:
    """Join the group as its sender, rank 0."""
    if backend == GLOO_BACKEND:
        return GlooSender(group, seconds=seconds)
    if backend == NCCL_BACKEND:
        return NcclSender(group, device=device)
    raise ValueError(f"unknown weight transfer {backend!r}; known: {GLOO_BACKEND}, {NCCL_BACKEND}")


class GlooSender:
    """One broadcast for each tensor: on gloo that is faster than large buckets."""

    def __init__(self, group: WeightGroup, *, seconds: float) -> None:
        self._group = join_gloo_group(group, rank=0, seconds=seconds)

    def send(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        checksums = {}
        for name, tensor in tensors:
            on_cpu = tensor.cpu()
            checksums[name] = checksum(on_cpu)
            broadcast(on_cpu, self._group)
        return checksums

    def close(self) -> None:
        self._group.abort()


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
