"""What every learner does, whatever shards it: meet, step, publish, export. One object for each rank, a plain class."""

from __future__ import annotations

import ctypes
import math
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.learners.model import Policy, to_tensors
from rlsys.learners.sender import WeightSender, open_sender
from rlsys.losses import LossInputs, LossOutputs
from rlsys.packing import MicroBatch
from rlsys.weights import WeightGroup, WeightPlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the step with this index (0-based): linear warm-up, then constant or cosine to a tenth."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Learner(ABC):
    """One rank of a learner. It knows no algorithm: credit was assigned before, the loss is given to it.

    A backend (a subclass) says how the model is sharded, how gradients meet and are applied, and what a checkpoint is.
    """

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:
        self._model_path = model_path
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device("cuda", 0) if config.gpus else torch.device("cpu")
        self._dtype = DTYPES[config.dtype]
        self._step = 0
        self._skipped_in_a_row = 0
        self._sender: WeightSender | None = None
        self._policy: Policy
        self._reference: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._reference_moved = False

    # --- what a backend does -----------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self, policy: Policy, optimizer: OptimizerConfig) -> None:
        """Shard the policy over the ranks, which have met, give it AdamW and keep it as `_policy`."""

    @abstractmethod
    def _open_reference(self, policy: Policy) -> None:
        """Keep the policy, sharded like the trained one, as `_reference`."""

    @abstractmethod
    def _announce(self, *, last: bool) -> None:
        """Say before a micro-batch whether it is the last of its step."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch. The step's gradient is the *mean* of what the ranks added."""

    @abstractmethod
    def _apply(self, lr: float) -> float:
        """Clip the gradient, update the weights and forget the gradient; returns its norm over all ranks, unclipped.

        Nothing is updated, on any rank, where the norm is not finite.
        """

    @abstractmethod
    def _move_reference(self) -> None:
        """Copy the policy into the reference."""

    @abstractmethod
    def _full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, in the order of the plan and in the dtype of the forward pass; all ranks iterate."""

    @abstractmethod
    def save(self, folder: str) -> None:
        """Write this rank's shards of model and optimizer into a fresh folder, and of the reference if it was reset."""

    @abstractmethod
    def load(self, folder: str) -> None:
        """Read back what `save` wrote; training goes on bit for bit.

        Raises:
            CheckpointError: the folder holds no checkpoint that fits this learner.
        """

    # --- what all of them do -----------------------------------------------------------------------------------------

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
        self._optimizer_config = optimizer
        self._total_steps = total_steps
        self._loss = loss
        policy = self._load_policy()
        shapes = [list(parameter.shape) for parameter in policy.parameters()]  # a shard does not tell them any more
        self._open(policy.train(), optimizer)
        if with_reference:
            self._open_reference(self._load_policy().eval().requires_grad_(False))
        names = [name for name, _ in self._named_parameters()]
        return WeightPlan(names=names, dtype_names=[self._config.dtype] * len(names), shapes=shapes)

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies by the policy."""
        logprobs, entropy = self._policy(*arguments)
        return logprobs, entropy

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        """Parameters, sharded or not, under the names of a `save_pretrained` folder; tied ones appear once."""
        return [(name.removeprefix("hf."), parameter) for name, parameter in self._policy.named_parameters()]

    def _load_policy(self) -> Policy:
        return Policy.load(self._model_path, activation_checkpointing=self._config.activation_checkpointing)

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
            self._announce(last=index == len(micro_batches) - 1)
            loss, sums, gap = self._loss_of(micro, temperature, loss_options)
            self._backward(loss * (self._world_size / num_tokens))
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
        logprobs, entropy = self._forward(*arguments, temperature)
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
        lr = learning_rate(self._step, self._optimizer_config, self._total_steps)
        norm = self._apply(lr)
        self._step += 1
        self._skipped_in_a_row = 0 if math.isfinite(norm) else self._skipped_in_a_row + 1
        return {"grad_norm": norm, "lr": lr, "skipped_in_a_row": float(self._skipped_in_a_row)}

    def reset_reference(self) -> None:
        """Make the current policy the reference of the KL penalty."""
        assert self._reference is not None, "the learner was started without a reference"
        self._move_reference()
        self._reference_moved = True

    def open_weights(self, group: WeightGroup, *, backend: str, timeout: float) -> None:
        """Meet the engines; only rank 0 sends, the others help to gather."""
        if self._sender is not None:
            self._sender.close()
        self._sender = open_sender(backend, group, seconds=timeout, device=self._device) if self._rank == 0 else None

    def send_weights(self) -> dict[str, int]:
        """Send every parameter in the planned order; returns the checksum of each (empty but on rank 0)."""
        if self._sender is not None:
            return self._sender.send(self._full_weights())
        for _ in self._full_weights():
            continue
        return {}

    def export(self, folder: str) -> None:
        """Write a `save_pretrained` folder, tokenizer included; every rank takes part, rank 0 writes."""
        # Shared weights under one name only: written twice, a reader takes them for two.
        state: dict[str, Tensor] = {}
        for name, weight in self._full_weights():
            if self._rank == 0:
                state[name] = weight.cpu()
        if self._rank == 0:
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
