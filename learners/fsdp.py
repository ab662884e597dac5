"""The learner on PyTorch FSDP2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learners.learner import Learner
from rlsys.learners.model import Policy


class FsdpLearner(Learner):
    """One rank: parameters, gradients and optimizer states are sharded, and gathered layer by layer."""

    _reference: Policy | None

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:
        super().__init__(model_path=model_path, config=config, rank=rank, world_size=world_size)
        if config.options:
            raise ConfigError(f"learners.options: FsdpLearner has none, but {', '.join(config.options)} was given")

    def _open(self, policy: Policy, optimizer: OptimizerConfig) -> None:
        self._mesh = init_device_mesh(self._device.type, (self._world_size,))
        self._policy = self._sharded(policy)
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def _open_reference(self, policy: Policy) -> None:
        self._reference = self._sharded(policy)

    def _sharded(self, policy: Policy) -> Policy:
        policy.to(self._device)
        precision = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32)
        for layer in policy.layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=precision)
        fully_shard(policy, mesh=self._mesh, mp_policy=precision)
        return policy

    def _announce(self, *, last: bool) -> None:
        self._policy.set_requires_gradient_sync(last)  # type: ignore[operator]

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _apply(self, lr: float) -> float:
        parameters = list(self._policy.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._optimizer_config.max_grad_norm)
        norm_value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(norm_value):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm_value

    def _move_reference(self) -> None:
        assert self._reference is not None
        self._reference.reshard()  # type: ignore[operator]
        with torch.no_grad():
            for kept, current in zip(self._reference.parameters(), self._policy.parameters(), strict=True):
                kept.copy_(current)

    def _full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
            yield name, full.detach().to(self._dtype).contiguous()

    def save(self, folder: str) -> None:
        """Write this rank's shards of model and optimizer into a fresh folder, and of the reference if it was reset."""
        save_distributed(self._state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        """Read back what `save` wrote, at this or another world size."""
        try:
            saved = FileSystemReader(folder).read_metadata().state_dict_metadata
            self._reference_moved = any(name.startswith("reference.") for name in saved)
            state = self._state()
            load_distributed(state, checkpoint_id=folder)
        except (RuntimeError, OSError, CheckpointException) as error:
            raise CheckpointError(f"{folder} does not fit this model: {error}") from error
        set_state_dict(
            self._policy, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self._reference is not None and self._reference_moved:
            set_model_state_dict(self._reference, state["reference"])
        self._step = int(state["step"])

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, as it is now."""
        model, optimizer = get_state_dict(self._policy, self._optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": torch.tensor(self._step)}
        if self._reference is not None and self._reference_moved:
            self._reference.reshard()  # type: ignore[operator]
            state["reference"] = get_model_state_dict(self._reference)
        return state
