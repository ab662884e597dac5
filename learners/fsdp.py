"""The learner on PyTorch FSDP2: one object for each rank, a plain class that runs with or without Ray."""

from __future__ import annotations

import ctypes
import math
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
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
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.errors import CheckpointError
from rlsys.learners.model import Policy, to_tensors
from rlsys.learners.sender import WeightSender, open_sender
from rlsys.losses import LossInputs, LossOutputs
from rlsys.packing import MicroBatch
from rlsys.weights import WeightGroup, WeightPlan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the step with this index (0-based): linear warm-up, then constant or cosine to a tenth."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class FsdpLearner:
    """One rank of the learner. It knows no algorithm: credit was assigned before, the loss is given to it."""

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:
        self._model_path = model_path
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device("cuda", 0) if config.gpus else torch.device("cpu")
        self._skipped_in_a_row = 0
        self._sender: WeightSender | None = None
        self._reference: Policy | None = None
        self._reference_moved = False

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port on this rank's node, for the others to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return _own_address(), port

    def start(
        self,
        *,
        master: tuple[str, int],
        optimizer: OptimizerConfig,
        total_steps: int,
        loss: Callable[[LossInputs], LossOutputs],
        with_reference: bool = False,
        timeout: float = 600.0,
    ) -> WeightPlan:
        """Meet the other ranks, load and shard the model; returns what `send_weights` will send."""
        if self._device.type == "cpu":
            torch.set_num_threads(1)
            _keep_freed_memory()
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=f"tcp://{master[0]}:{master[1]}",
            rank=self._rank,
            world_size=self._world_size,
            timeout=timedelta(seconds=timeout),
        )
        self._mesh = init_device_mesh(self._device.type, (self._world_size,))
        self._policy = self._load_sharded()
        self._policy.train()
        if with_reference:
            self._reference = self._load_sharded().eval().requires_grad_(False)
        self._optimizer_config = optimizer
        self._total_steps = total_steps
        self._loss = loss
        self._step = 0
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        parameters = self._named_parameters()
        return WeightPlan(
            names=[name for name, _ in parameters],
            dtype_names=[self._config.dtype] * len(parameters),
            shapes=[list(parameter.shape) for _, parameter in parameters],
        )

    def _load_sharded(self) -> Policy:
        policy = Policy.load(self._model_path, activation_checkpointing=self._config.activation_checkpointing)
        policy.to(self._device)
        precision = MixedPrecisionPolicy(param_dtype=_DTYPES[self._config.dtype], reduce_dtype=torch.float32)
        for layer in policy.layers:
            fully_shard(layer, mesh=self._mesh, mp_policy=precision)
        fully_shard(policy, mesh=self._mesh, mp_policy=precision)
        return policy

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        """Parameters under the names of a `save_pretrained` folder; tied ones appear once."""
        return [(name.removeprefix("hf."), parameter) for name, parameter in self._policy.named_parameters()]

    def step(
        self, micro_batches: Sequence[MicroBatch], *, num_tokens: int, temperature: float, **loss_options: Any
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of a batch with `num_tokens` trained tokens in all ranks together.

        Returns sums over this rank's tokens under `sum/...`, maxima under `max/...`, and numbers that all ranks share.
        A step whose gradient is not finite is skipped on all ranks alike.
        """
        started = time.perf_counter()
        totals: dict[str, float] = {"sum/tokens": 0.0, "sum/trained_tokens": 0.0}
        for index, micro in enumerate(micro_batches):
            self._policy.set_requires_gradient_sync(index == len(micro_batches) - 1)  # type: ignore[operator]
            loss, sums, gap = self._loss_of(micro, temperature, loss_options)
            (loss * (self._world_size / num_tokens)).backward()
            totals["sum/tokens"] += len(micro.tokens)
            totals["sum/trained_tokens"] += len(micro.targets)
            totals["max/logprob_gap"] = max(totals.get("max/logprob_gap", 0.0), gap)
            for name, value in {"loss": loss.detach(), **sums}.items():
                totals[f"sum/{name}"] = totals.get(f"sum/{name}", 0.0) + float(value)
        totals.update(self._update())
        totals["seconds"] = time.perf_counter() - started
        return totals

    def _loss_of(
        self, micro: MicroBatch, temperature: float, loss_options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        arguments = to_tensors(micro, self._device)
        logprobs, entropy = self._policy(*arguments, temperature)
        reference = None
        if self._reference is not None:
            with torch.no_grad():
                reference = self._reference(*arguments, temperature)[0]
        rollout_logprobs = torch.from_numpy(micro.rollout_logprobs).to(self._device)
        outputs = self._loss(
            LossInputs(
                logprobs=logprobs,
                rollout_logprobs=rollout_logprobs,
                advantages=torch.from_numpy(micro.advantages).to(self._device),
                sequences=torch.from_numpy(micro.sequences).to(self._device),
                ref_logprobs=reference,
                **loss_options,
            )
        )
        if outputs.loss.shape != logprobs.shape:
            raise ValueError(
                f"the loss function returned a loss of shape {tuple(outputs.loss.shape)} for {len(logprobs)} tokens; "
                "return one number for each token, without summing"
            )
        loss = (outputs.loss * torch.from_numpy(micro.weights).to(self._device)).sum()
        gaps = (logprobs.detach() - rollout_logprobs).abs()
        sums = {**outputs.sums, "entropy": entropy.sum(), "logprob_gap": gaps.sum()}
        return loss, sums, float(gaps.max()) if len(gaps) else 0.0

    def _update(self) -> dict[str, float]:
        parameters = list(self._policy.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._optimizer_config.max_grad_norm)
        norm_value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        finite = math.isfinite(norm_value)
        lr = learning_rate(self._step, self._optimizer_config, self._total_steps)
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        return {"grad_norm": norm_value, "lr": lr, "skipped_in_a_row": float(self._skipped_in_a_row)}

    def reset_reference(self) -> None:
        """Make the current policy the reference of the KL penalty."""
        assert self._reference is not None, "the learner was started without a reference"
        self._reference.reshard()  # type: ignore[operator]
        with torch.no_grad():
            for kept, current in zip(self._reference.parameters(), self._policy.parameters(), strict=True):
                kept.copy_(current)
        self._reference_moved = True

    def open_weights(self, group: WeightGroup, *, backend: str, timeout: float) -> None:
        """Meet the engines; only rank 0 sends, the others help to gather."""
        if self._sender is not None:
            self._sender.close()
        self._sender = open_sender(backend, group, seconds=timeout, device=self._device) if self._rank == 0 else None

    def send_weights(self) -> dict[str, int]:
        """Send every parameter in the planned order; returns the checksum of each (empty but on rank 0)."""
        dtype = _DTYPES[self._config.dtype]

        def gathered() -> Any:
            for name, parameter in self._named_parameters():
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
                yield name, full.detach().to(dtype).contiguous()

        if self._sender is not None:
            return self._sender.send(gathered())
        for _ in gathered():
            continue
        return {}

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

    def export(self, folder: str) -> None:
        """Write a `save_pretrained` folder, tokenizer included; every rank takes part, rank 0 writes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full: dict[str, Any] = get_model_state_dict(self._policy, options=options)
        if self._rank == 0:
            dtype = _DTYPES[self._config.dtype]
            # Shared weights under one name only: written twice, a reader takes them for two.
            state = {name: full[f"hf.{name}"].to(dtype) for name, _ in self._named_parameters()}
            self._policy.hf.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
            _copy_tokenizer(self._model_path, folder)
        dist.barrier()

    def close(self) -> None:
        """Leave all groups."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the kernel, and every page of their successors faults: up to a quarter of a
    step on CPUs. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names and numbers of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)
        mallopt(mmap_threshold, 32 * 2**20)  # the most it takes


def _own_address() -> str:
    """This node's address as other nodes see it; loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: nothing is sent, only a route is chosen
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _copy_tokenizer(source: str, target: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(target)
