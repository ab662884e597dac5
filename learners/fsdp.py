"""The learner on PyTorch FSDP2."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.checkpoint import check_same_model
from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learners import health, tensor_parallel
from rlsys.learners.learner import Learner
from rlsys.learners.model import PackedNetwork
from rlsys.learners.optimizers import optimizers
from rlsys.packing import MicroBatch
from rlsys.plugins import check_options

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""What a checkpoint holds of the policy: weights that adapters stand beside come from the model's folder again."""

_UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError)
"""What torch raises where files are missing, cut or full of something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpOptions:
    """`learners.options`."""

    cpu_offload: bool = False
    """Weights, gradients and optimizer states live in the host's memory between the layers' turns."""
    tensor_parallel: int = 1
    """Ranks that compute the same tokens together, each with its part of every layer."""


class FsdpLearner(Learner):
    """One rank: parameters, gradients and optimizer states are sharded, and gathered layer by layer.

    With tensor parallelism the ranks are a table, `tensor_parallel` of them in a row. A row has its own share of the
    batch. The layers are cut over the ranks of a row, and what a rank has of them is sharded, and gathered, over its
    column; embedding, last norm and head are sharded over all ranks.
    """

    _reference: PackedNetwork | None
    _writing: Future[Any] | None = None

    @classmethod
    def check_config(cls, config: LearnersConfig, optimizers: Mapping[str, OptimizerConfig]) -> None:  # noqa: ARG003
        """Refuse options that do not exist, and ranks that are no whole rows. Every optimizer works."""
        check_options(FsdpOptions, config.options, place="learners")
        size = FsdpOptions(**config.options).tensor_parallel
        if type(size) is not int or size < 1:
            raise ConfigError(f"learners.options.tensor_parallel is {size!r}; give a number of ranks, 1 for none")
        if size > 1 and config.liger:
            raise ConfigError(
                f"learners.liger=true and learners.options.tensor_parallel={size}: its norms cannot compute on what is "
                "cut over ranks; leave one out"
            )
        if config.count % size:
            raise ConfigError(
                f"learners.options.tensor_parallel is {size}, which does not divide the {config.count} ranks; set "
                f"learners.count (of a critic rl.critic.count) to {config.count + -config.count % size}, or another "
                "tensor_parallel"
            )

    @classmethod
    def ranks_per_share(cls, config: LearnersConfig) -> int:
        """Those of tensor parallelism."""
        return FsdpOptions(**config.options).tensor_parallel

    def _open(self, policy: PackedNetwork, optimizer: OptimizerConfig) -> None:
        self._mesh = self._column = init_device_mesh(self._device.type, (self._world_size,))
        if self._ranks_per_share > 1:
            tensor_parallel.check_fits(policy, self._ranks_per_share, model=self._model_path)
            shape = (self._world_size // self._ranks_per_share, self._ranks_per_share)
            table = init_device_mesh(self._device.type, shape, mesh_dim_names=("column", "row"))
            self._column, self._row = table["column"], table["row"]
        # A thread that writes a checkpoint must not get between the collectives of the training.
        self._saving_group = dist.new_group(backend="gloo")
        self._policy = self._sharded(policy)
        self._optimizers = optimizers(self._policy, optimizer)

    def _open_reference(self, policy: PackedNetwork) -> None:
        self._reference = self._sharded(policy)

    def _sharded(self, policy: PackedNetwork) -> PackedNetwork:
        policy.to(self._device)
        if self._ranks_per_share > 1:
            tensor_parallel.cut_layers(policy, self._row)
        settings: dict[str, Any] = {
            "mp_policy": MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32),
            "offload_policy": _offload_policy(FsdpOptions(**self._config.options)),
        }
        for layer in policy.layers:
            fully_shard(layer, mesh=self._column, **settings)
        fully_shard(policy, mesh=self._mesh, **settings)
        return policy

    def infer(
        self, micro_batches: Sequence[MicroBatch], *, temperature: float, reference: bool = False
    ) -> list[NDArray[np.float32]]:
        """As every learner's; afterwards nothing is left gathered, which an update would not reach."""
        found = super().infer(micro_batches, temperature=temperature, reference=reference)
        self._policy.reshard()  # type: ignore[operator]
        return found

    def _announce(self, *, last: bool) -> None:
        self._policy.set_requires_gradient_sync(last)  # type: ignore[operator]

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _apply(self, lr: float) -> float:
        gradients = [weight.grad for weight in self._policy.parameters() if weight.grad is not None]
        (norm,) = health.total_norms(self._once(gradients), device=self._device)
        if math.isfinite(norm):
            factor = self._optimizer_config.max_grad_norm / (norm + 1e-6)
            if factor < 1:
                torch._foreach_mul_(list(map(_local, gradients)), factor)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        self._policy.zero_grad(set_to_none=True)
        return norm

    def _masters(self) -> list[Tensor]:
        return self._once([weight.detach() for weight in self._policy.parameters() if weight.requires_grad])

    def _once(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The shards of these on this rank, without those that the first rank of its row has as well."""
        first = self._rank % self._ranks_per_share == 0
        return [_local(tensor) for tensor in tensors if first or self._is_cut(tensor)]

    def _is_cut(self, tensor: Tensor) -> bool:
        """Whether no two ranks have the same of it: a norm in a layer is whole in every column."""
        if not isinstance(tensor, DTensor):
            return False
        return tensor.device_mesh.size() == self._world_size and not any(p.is_replicate() for p in tensor.placements)

    def _move_reference(self) -> None:
        assert self._reference is not None
        self._reference.reshard()  # type: ignore[operator]
        with torch.no_grad():
            for kept, current in zip(self._reference.parameters(), self._policy.parameters(), strict=True):
                kept.copy_(current)

    def _whole(self, parameter: Tensor) -> Tensor:
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data).detach().to(self._device)

    def save(self, folder: str) -> None:
        """Copy this rank's shards of model and optimizer into memory, and of the reference if it was reset.

        A thread writes the copy into the fresh folder, with collectives in a group that nothing else uses.
        """
        if self._writing is not None:  # it failed, and another rank was first to say so
            wait([self._writing])
        writing = async_save(self._state(), checkpoint_id=folder, process_group=self._saving_group)
        assert isinstance(writing, Future)
        self._writing, self._written_to = writing, folder

    def saved(self) -> bool:
        """Whether all that `save` began is written, on all ranks."""
        if self._writing is None:
            return True
        if not self._writing.done():
            return False
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except (CheckpointException, *_UNREADABLE) as error:
            raise CheckpointError(f"{self._written_to} could not be written: {_reason(error)}") from error
        return True

    def close(self) -> None:
        """Leave all groups, when nothing is being written any more."""
        if self._writing is not None:
            wait([self._writing])
        super().close()

    def load(self, folder: str) -> None:
        """Read back what `save` wrote, at this or another world size."""
        try:
            saved = FileSystemReader(folder).read_metadata().state_dict_metadata
        except _UNREADABLE as error:
            raise CheckpointError(f"{folder} holds no whole checkpoint: {_reason(error)}") from error
        self._reference_moved = any(name.startswith("reference.") for name in saved)
        state = self._state()
        shapes = {name: list(getattr(of, "size", ())) for name, of in saved.items() if name.startswith("model.")}
        check_same_model(folder, saved=shapes, mine={f"model.{name}": t.shape for name, t in state["model"].items()})
        try:
            load_distributed(state, checkpoint_id=folder)
        except (CheckpointException, *_UNREADABLE) as error:
            raise CheckpointError(f"{folder} cannot be read, or does not fit: {_reason(error)}") from error
        set_state_dict(
            self._policy,
            self._optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_TRAINED,
        )
        if self._reference is not None and self._reference_moved:
            set_model_state_dict(self._reference, state["reference"])
        self._step = int(state["step"])

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds, as it is now."""
        model, optimizer = get_state_dict(self._policy, self._optimizers, options=_TRAINED)
        for name, parameter in self._policy.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                model.pop(name, None)  # the second name of a shared weight, which torch keeps
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": torch.tensor(self._step)}
        if self._reference is not None and self._reference_moved:
            self._reference.reshard()  # type: ignore[operator]
            state["reference"] = get_model_state_dict(self._reference)
        return state


def _offload_policy(options: FsdpOptions) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if options.cpu_offload else OffloadPolicy()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reason(error: BaseException) -> str:
    """What is behind it, in one line; the first of what all ranks say."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
