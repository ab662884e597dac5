"""The learner on DeepSpeed's ZeRO."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.checkpoint import check_same_model
from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learners.learner import Learner
from rlsys.learners.model import PackedNetwork
from rlsys.learners.optimizers import adamw
from rlsys.plugins import check_options

if importlib.util.find_spec("deepspeed") is None:
    raise ImportError("DeepSpeed is not installed; `pip install rlsys[deepspeed]` brings the version that fits")

_OWN_SETTINGS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "torch_autocast",
)
"""Keys of a DeepSpeed configuration that other sections of the run's configuration decide."""

_TAG, _REFERENCE, _ABOUT = "zero", "reference.pt", "learner.json"
"""In a checkpoint: the folder that DeepSpeed writes, the weights of a reference that was reset, and what it is of."""


class DeepSpeedLearner(Learner):
    """One rank of ZeRO-2 (gradients and optimizer states are sharded) or ZeRO-3 (parameters as well).

    DeepSpeed averages gradients over ranks and would divide by a fixed number of micro-batches; the second is turned
    off, the first is part of the learner's contract, so a step's gradient is that of the one global sum.
    """

    _reference: Any

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:
        super().__init__(model_path=model_path, config=config, rank=rank, world_size=world_size)
        self._settings = _settings(config.dtype, **config.options)
        self._stage = int(self._settings["zero_optimization"]["stage"])

    @classmethod
    def check_config(cls, config: LearnersConfig, optimizers: Mapping[str, OptimizerConfig]) -> None:
        """Refuse options that ZeRO has no meaning for, and optimizers other than AdamW."""
        check_options(_settings, config.options, place="learners", given=1)
        _settings(config.dtype, **config.options)
        for place, optimizer in optimizers.items():
            if optimizer.kind != "adamw":
                raise ConfigError(
                    f"{place}.kind is {optimizer.kind}, but DeepSpeedLearner has adamw only, because ZeRO flattens the "
                    "weights; set adamw, or learners.use=rlsys.learners.fsdp:FsdpLearner"
                )

    def _open(self, policy: PackedNetwork, optimizer: OptimizerConfig) -> None:
        deepspeed = _imported(self._device)
        self._policy = policy
        exact = {} if self._dtype == torch.float32 else {n: p.detach() for n, p in policy.named_parameters()}
        adam = adamw((weight for weight in policy.parameters() if weight.requires_grad), optimizer)
        settings = {**self._settings, "gradient_clipping": optimizer.max_grad_norm}
        self._engine = deepspeed.initialize(model=policy, optimizer=adam, config=settings, dist_init_required=False)[0]
        self._restore_master_weights(exact)

    def _restore_master_weights(self, exact: Mapping[str, Tensor]) -> None:
        """Undo a rounding: DeepSpeed makes the master weights of the model after it cast that to bfloat16."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self._policy.named_parameters():
            if name in exact and self._stage == 2:
                safe_set_full_fp32_param(parameter, exact[name].to(parameter.device))
            elif name in exact:
                safe_set_local_fp32_param(parameter, self._shard_of(exact[name], parameter).to(self._device))

    def _shard_of(self, whole: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a parameter of ZeRO-3; the last one is filled up with zeros."""
        size = parameter.ds_tensor.numel()
        flat = whole.flatten()[self._rank * size : (self._rank + 1) * size]
        return torch.nn.functional.pad(flat, (0, size - len(flat)))

    def _open_reference(self, policy: PackedNetwork) -> None:
        if self._stage == 2:
            # Parameters are whole on every rank of ZeRO-2, so the reference is.
            self._reference = policy.to(self._device)
            for parameter in policy.parameters():  # not buffers: rotary frequencies stay exact, as in the policy
                parameter.data = parameter.data.to(self._dtype)
            return
        deepspeed = _imported(self._device)
        self._reference = deepspeed.initialize(model=policy, config=self._settings, dist_init_required=False)[0]

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        if self._stage == 3:
            self._agree_on_chunks(num_targets=len(arguments[3]))
        logprobs, entropy = self._engine(*arguments)
        return logprobs, entropy

    def _agree_on_chunks(self, num_targets: int) -> None:
        """Let the head run equally often on all ranks: they gather it each time, and would wait for one another."""
        chunks = torch.tensor(self._policy.num_chunks(num_targets), device=self._device)
        dist.all_reduce(chunks, op=dist.ReduceOp.MAX)
        self._policy.least_chunks = int(chunks)
        if self._reference is not None:
            self._reference_network().least_chunks = int(chunks)

    def _announce(self, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def _apply(self, lr: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()  # clips, and skips a step whose norm is not finite
        return float(self._engine.get_global_grad_norm())

    def _masters(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        found: list[Tensor] = (
            optimizer.single_partition_of_fp32_groups if self._stage == 2 else optimizer.fp32_partitioned_groups_flat
        )
        return [shard.detach() for shard in found]

    def _move_reference(self) -> None:
        current = dict(self._policy.named_parameters())

        @contextmanager
        def weights(name: str) -> Iterator[Tensor]:
            with self._gathered(current[name]):
                yield current[name].detach()

        self._fill_reference(weights)

    def _fill_reference(self, weights: Callable[[str], AbstractContextManager[Tensor]]) -> None:
        for name, parameter in self._reference_network().named_parameters():
            with weights(name) as weight, self._gathered(parameter, modifier=0):
                parameter.data.copy_(weight)

    def _reference_network(self) -> PackedNetwork:
        if self._config.lora is not None:  # the policy itself, without its adapters
            return self._policy
        network = self._reference if self._stage == 2 else self._reference.module
        assert isinstance(network, PackedNetwork)
        return network

    def _gathered(self, *parameters: Tensor, modifier: int | None = None) -> AbstractContextManager[Any]:
        """Inside, these parameters are whole; what rank `modifier` writes into them stays, on all ranks."""
        if self._stage == 2:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier)
        return gathered

    def _whole(self, parameter: Tensor) -> Tensor:
        with self._gathered(parameter):
            # A copy: what was gathered is freed at the end of the block, and the sender may keep it longer.
            return parameter.detach().clone()

    def save(self, folder: str) -> None:
        """Write DeepSpeed's own checkpoint into a fresh folder, and the reference if it was reset.

        All is written when this returns. DeepSpeed's `zero_to_fp32.py` in it makes ordinary weights of it, without
        this package.
        """
        self._engine.save_checkpoint(folder, tag=_TAG)
        if self._reference_moved:
            kept = {}
            for name, parameter in self._reference_network().named_parameters():
                with self._gathered(parameter):
                    if self._rank == 0:
                        kept[name] = parameter.detach().cpu().clone()
            if self._rank == 0:
                torch.save(kept, Path(folder) / _REFERENCE)
        if self._rank == 0:
            written = {
                **self._layout(),
                "step": self._step,
                "reference": self._reference_moved,
                "weights": self._shapes,
            }
            (Path(folder) / _ABOUT).write_text(json.dumps(written))
        dist.barrier()

    def saved(self) -> bool:
        """Always: DeepSpeed writes its own format before `save` returns."""
        return True

    def load(self, folder: str) -> None:
        """Read back what `save` wrote with as many ranks, at the same stage and dtype; bit for bit."""
        try:
            about = self._about(folder)
            self._engine.load_checkpoint(folder, tag=_TAG)
            if self._reference is not None and about["reference"]:
                kept = torch.load(Path(folder) / _REFERENCE, mmap=True, weights_only=True)
                self._fill_reference(lambda name: nullcontext(kept[name]))
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, AssertionError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{folder} does not fit this model: {error}") from error
        self._reference_moved = bool(about["reference"])
        self._step = int(about["step"])

    def _about(self, folder: str) -> Mapping[str, Any]:
        """What the checkpoint says of itself, where it fits this learner."""
        about = json.loads((Path(folder) / _ABOUT).read_text())
        mine = self._layout()
        if not isinstance(about, dict) or about.keys() != mine.keys() | {"step", "reference", "weights"}:
            raise CheckpointError(f"{Path(folder) / _ABOUT} is not of a DeepSpeed learner's checkpoint: {about!r}")
        written = {name: about[name] for name in mine}
        if written != mine:
            raise CheckpointError(
                f"{folder} was written with {_spelt(written)} and cannot be resumed with {_spelt(mine)}; "
                "set the former, or begin a new run from an exported model"
            )
        check_same_model(folder, saved=about["weights"], mine=self._shapes)
        return about

    def _layout(self) -> dict[str, Any]:
        """What a checkpoint must have been written with."""
        return {"count": self._world_size, "options.stage": self._stage, "dtype": self._config.dtype}

    def close(self) -> None:
        """Leave all groups."""
        import deepspeed

        self._engine.destroy()
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        super().close()


def _settings(dtype: str, stage: int = 3, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration out of `learners.options`: ZeRO's stage, and anything else of its own.

    Raises:
        ConfigError: another stage than 2 or 3, or settings that other sections of the run decide.
    """
    if stage not in (2, 3):
        raise ConfigError(f"learners.options.stage is {stage!r}; give 2 for ZeRO-2 or 3 for ZeRO-3")
    settings = dict(settings or {})
    taken = [name for name in _OWN_SETTINGS if name in settings]
    if taken:
        raise ConfigError(
            f"learners.options.settings: {', '.join(taken)} follows from `optimizer`, `learners.dtype` and "
            "`learners.max_tokens_per_micro_batch`; set those"
        )
    zero = dict(settings.pop("zero_optimization", {}))
    if "stage" in zero:
        raise ConfigError("learners.options.settings.zero_optimization.stage: set learners.options.stage instead")
    return {
        # The learner packs its micro-batches itself and says which is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        **settings,
        "zero_optimization": {**zero, "stage": stage},
    }


def _spelt(layout: Mapping[str, Any]) -> str:
    return " ".join(f"learners.{key}={value}" for key, value in layout.items())


def _imported(device: torch.device) -> Any:
    """DeepSpeed, set to this device: it looks for one when it is imported, and would take any GPU that it sees."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = "0"  # a rank sees no device but its own
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A kernel for inference on CPUs, which it would compile at the first start behind a lock file: a process that is
    # killed meanwhile leaves the lock, and every later start waits for it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
