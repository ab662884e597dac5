"""vLLM's end of the weight transfer, registered with it through its `vllm.general_plugins` entry point.

Runs inside vLLM's worker process. Both engines are vLLM's lifecycle with two additions: what was received is summed up,
so that the driver can compare it with what was sent, and a transfer that failed may be followed by another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlsys.actors.receivers import WeightReceiver, open_receiver
from rlsys.shared_weights import SharedPlace, SharedReader
from rlsys.weights import GLOO_BACKEND, NCCL_BACKEND, WeightGroup, WeightPlan, checksum


def register() -> None:
    """Make both back ends known to vLLM; called in every process that vLLM starts, perhaps more than once."""
    for name, engine in ((GLOO_BACKEND, CpuWeightTransferEngine), (NCCL_BACKEND, ProvedNcclEngine)):
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, engine)


def refresh_shared_head(model: Any, received: Mapping[str, int]) -> None:
    """Give an output head that shares the embedding's weights those weights.

    A learner sends shared weights once, so vLLM does not reload such a head. But on CPUs it computes with a packed copy
    of them, and where a checkpoint holds the head a second time vLLM keeps it apart: either would stay old.
    """
    head = getattr(model, "lm_head", None)
    if head is None or "lm_head.weight" in received:
        return
    embedding = model.model.embed_tokens
    with torch.no_grad():
        head.weight.data.copy_(embedding.weight.data)
    head.quant_method.process_weights_after_loading(head)


@contextmanager
def _whole_again(engine: Any) -> Iterator[None]:
    """Where receiving fails: end the update, so that vLLM can begin another; what the model holds is not defined."""
    try:
        yield
    except BaseException:
        finalize_layerwise_reload(engine.model, engine.model_config)
        raise


class _SummingModel:
    """Stands in for the model while weights arrive: sums up each tensor, then hands it on."""

    def __init__(self, model: torch.nn.Module, received: dict[str, int]) -> None:
        self._model = model
        self._received = received

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        pairs = list(weights)
        for name, tensor in pairs:
            self._received[name] = checksum(tensor)
        return self._model.load_weights(pairs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass
class CpuInitInfo(WeightTransferInitInfo):
    """Where the group meets and which rank this engine's first worker has."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    seconds: float


@dataclass
class CpuUpdateInfo(WeightTransferUpdateInfo):
    """The plan: names, number formats and shapes in the order of sending; and where to read what was sent before."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    published: dict[str, Any] | None = None


class CpuWeightTransferEngine(WeightTransferEngine[CpuInitInfo, CpuUpdateInfo]):
    """Receives weights over gloo, or reads them where a learner on this host has written them."""

    init_info_cls = CpuInitInfo
    update_info_cls = CpuUpdateInfo
    received: dict[str, int]
    _receiver: WeightReceiver | None = None

    def init_transfer_engine(self, init_info: CpuInitInfo) -> None:
        """Join the group of the learner."""
        self.shutdown()
        rank = init_info.rank_offset + self.parallel_config.rank
        group = WeightGroup(
            master_address=init_info.master_address,
            master_port=init_info.master_port,
            world_size=init_info.world_size,
        )
        self._receiver = open_receiver(group, rank=rank, seconds=init_info.seconds)

    def start_weight_update(self) -> None:
        """Undo the layouts that loading made (CPU linear layers are repacked), so that plain weights fit again."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: CpuUpdateInfo) -> None:
        """Receive, sum up and load every tensor of the plan."""
        plan = WeightPlan(names=update_info.names, dtype_names=update_info.dtype_names, shapes=update_info.shapes)
        self.received = {}
        with _whole_again(self):
            for name, tensor in self._tensors(plan, update_info.published):
                self.received[name] = checksum(tensor)
                self.model.load_weights([(name, tensor.to(self.device))])  # type: ignore[operator]

    def _tensors(self, plan: WeightPlan, published: dict[str, Any] | None) -> Iterator[tuple[str, Tensor]]:
        if published is not None:
            place = SharedPlace(**published)
            return SharedReader(place).read(place.serial, plan, seconds=0)
        assert self._receiver is not None, "init_transfer_engine comes first"
        return self._receiver.receive(plan)

    def finish_weight_update(self) -> None:
        """Make the layouts anew."""
        finalize_layerwise_reload(self.model, self.model_config)
        refresh_shared_head(self.model, self.received)

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class ProvedNcclEngine(NCCLWeightTransferEngine):
    """vLLM's packed NCCL broadcast, with checksums of what arrived."""

    received: dict[str, int]

    def finish_weight_update(self) -> None:
        """As the parent does, and the shared head."""
        super().finish_weight_update()
        refresh_shared_head(self.model, self.received)

    def receive_weights(self, update_info: Any) -> None:
        """As the parent does, summing up each tensor on its way into the model."""
        self.received = {}
        model = self.model
        with _whole_again(self):
            self.model = _SummingModel(model, self.received)  # type: ignore[assignment]
            try:
                super().receive_weights(update_info)
            finally:
                self.model = model


class WorkerExtension:
    """Methods that vLLM adds to its worker, for `collective_rpc`.

    vLLM imports this module to find it, which registers the back ends also where rlsys is not installed but only on the
    path, as by a Ray job's working directory.
    """

    weight_transfer_engine: Any

    def received_checksums(self) -> dict[str, int]:
        """Checksum of every tensor of the last update."""
        return dict(self.weight_transfer_engine.received)


register()
