"""What every learner does, whatever shards it: meet, step, publish, export. One object for each rank, a plain class."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.learners import health, lora
from rlsys.learners.host import free_port, keep_freed_memory, own_address
from rlsys.learners.kernels import use_kernels
from rlsys.learners.model import PackedNetwork, Policy, Scorer, to_tensors
from rlsys.learners.optimizers import learning_rate
from rlsys.learners.sender import SharedSender, WeightSender, open_sender
from rlsys.losses import LossInputs, LossOutputs
from rlsys.packing import MicroBatch
from rlsys.shared_weights import SharedPlace, SharedWriter
from rlsys.types import NetworkKind
from rlsys.weights import WeightGroup, WeightPlan

NETWORKS: dict[NetworkKind, type[PackedNetwork]] = {"policy": Policy, "scorer": Scorer}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Learner(ABC):
    """One rank of a learner. It knows no algorithm: credit was assigned before, the loss is given to it.

    A backend (a subclass) says how the model is sharded, how gradients meet and are applied, and what a checkpoint is.
    """

    def __init__(self, *, model_path: str, config: LearnersConfig, rank: int, world_size: int) -> None:
        self.check_config(config, {})
        self._model_path = model_path
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._ranks_per_share = self.ranks_per_share(config)
        self._device = torch.device("cuda", 0) if config.gpus else torch.device("cpu")
        self._dtype = DTYPES[config.dtype]
        self._step = 0
        self._skipped_in_a_row = 0
        self._sender: WeightSender | None = None
        self._memory: SharedWriter | None = None
        self._policy: PackedNetwork
        self._reference: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._reference_moved = False

    # --- what a backend does -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check_config(cls, config: LearnersConfig, optimizers: Mapping[str, OptimizerConfig]) -> None:
        """Find what the backend cannot do, before anything is started; the optimizers by their place in the file.

        Raises:
            ConfigError: names the place and the fix.
        """

    @classmethod
    def ranks_per_share(cls, config: LearnersConfig) -> int:  # noqa: ARG003
        """How many ranks, one behind the other, compute together and so get the same share of a batch."""
        return 1

    @abstractmethod
    def _open(self, policy: PackedNetwork, optimizer: OptimizerConfig) -> None:
        """Shard the policy over the ranks, which have met, give it an optimizer and keep it as `_policy`."""

    @abstractmethod
    def _open_reference(self, policy: PackedNetwork) -> None:
        """Keep the policy, sharded like the trained one, as `_reference`."""

    @abstractmethod
    def _announce(self, *, last: bool) -> None:
        """Say before a micro-batch whether it is the last of its step."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradient of this micro-batch. The step's gradient is the *mean* over the shares."""

    @abstractmethod
    def _apply(self, lr: float) -> float:
        """Clip the gradient, update the weights and forget the gradient; returns its norm over all ranks, unclipped.

        Nothing is updated, on any rank, where the norm is not finite.
        """

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """This rank's shards of the weights that the optimizer updates; those of all ranks are the weights, once."""

    @abstractmethod
    def _move_reference(self) -> None:
        """Copy the policy into the reference."""

    @abstractmethod
    def _whole(self, parameter: Tensor) -> Tensor:
        """A parameter of the policy gathered from all ranks, which all call this; it stays as it is meanwhile only."""

    @abstractmethod
    def save(self, folder: str) -> None:
        """Write this rank's shards of model and optimizer into a fresh folder, and of the reference if it was reset.

        The state is that of now, but it may be written later, until `saved`; the learner may go on meanwhile.
        """

    @abstractmethod
    def saved(self) -> bool:
        """Whether all that `save` began is written.

        Raises:
            CheckpointError: it could not be; said once.
        """

    @abstractmethod
    def load(self, folder: str) -> None:
        """Read back what `save` wrote; training goes on bit for bit.

        Raises:
            CheckpointError: the folder holds no checkpoint that fits this learner.
        """

    # --- what all of them do -----------------------------------------------------------------------------------------

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port on this rank's node, for the others to meet at."""
        return own_address(), free_port()

    def start(
        self,
        *,
        master: tuple[str, int],
        optimizer: OptimizerConfig,
        total_steps: int,
        loss: Callable[[LossInputs], LossOutputs],
        with_reference: bool = False,
        network: NetworkKind = "policy",
        timeout: float = 600.0,
    ) -> WeightPlan:
        """Meet the other ranks, load and shard the model; returns what `send_weights` will send."""
        self.check_config(self._config, {"optimizer": optimizer})
        if self._device.type == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
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
        self._network_class = NETWORKS[network]
        policy = self._load_policy()
        # A shard tells none of these any more.
        shapes = [list(weight.shape) for name, weight in policy.named_parameters() if not lora.is_adapter(name)]
        self._vocabulary, self._size = health.vocabulary_of(policy), health.ModelSize.of(policy)
        self._open(policy.train(), optimizer)
        if with_reference and self._config.lora is not None:
            self._reference = self._without_adapters
        elif with_reference:
            self._open_reference(self._load_policy().eval().requires_grad_(False))
        names = [name for name, _ in self._named_parameters()]
        self._shapes = dict(zip(names, shapes, strict=True))
        self._plan = WeightPlan(names=names, dtype_names=[self._config.dtype] * len(names), shapes=shapes)
        return self._plan

    def _forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies by the policy."""
        logprobs, entropy = self._policy(*arguments)
        return logprobs, entropy

    def _without_adapters(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """What the frozen weights alone say: the model that training began with, at no cost in memory."""
        lora.set_adapters(self._policy, enabled=False)
        try:
            return self._forward(*arguments)
        finally:
            lora.set_adapters(self._policy, enabled=True)

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        """Parameters, sharded or not, under the names of a `save_pretrained` folder; tied ones appear once.

        Adapters are not among them: such a folder has them merged.
        """
        return [
            (lora.published(name.removeprefix("hf.")), parameter)
            for name, parameter in self._policy.named_parameters()
            if not lora.is_adapter(name)
        ]

    def _full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, in the order of the plan and in the dtype of the forward pass; all ranks iterate."""
        own = dict(self._policy.named_parameters())
        found = {} if self._config.lora is None else lora.adapters(self._policy)
        for name, parameter in own.items():
            if lora.is_adapter(name):
                continue
            weight = self._whole(parameter)
            if (adapter := found.get(name)) is not None:
                change = self._whole(own[adapter.up]).float() @ self._whole(own[adapter.down]).float()
                weight = weight.float() + adapter.scaling * change
            yield lora.published(name.removeprefix("hf.")), weight.to(self._dtype).contiguous()

    def _load_policy(self) -> PackedNetwork:
        network = self._network_class.load(
            self._model_path, activation_checkpointing=self._config.activation_checkpointing, adapters=self._config.lora
        )
        use_kernels(network.hf, self._config)
        return network

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        num_tokens: int,
        temperature: float,
        reference: bool = True,
        **loss_options: Any,
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of a batch with `num_tokens` trained tokens in all ranks together.

        `reference=False` spares the frozen policy's forward pass where the loss has no use for it.

        Returns sums over this rank's tokens under `sum/...`, maxima under `max/...`, and numbers that all ranks share.
        Of ranks that have one share together only the first says what is the sum over it.
        A step whose gradient is not finite is skipped on all ranks alike. One whose gradient is zero, as where no
        advantage is, is a step: momentum and weight decay still move the weights.

        Raises:
            DataError: a token is not in the model's vocabulary; nothing was computed.
        """
        started = time.perf_counter()
        self._check(micro_batches)
        health.forget_peak_memory(self._device)
        totals: dict[str, float] = {"sum/tokens": 0.0, "sum/trained_tokens": 0.0}
        for index, micro in enumerate(micro_batches):
            self._announce(last=index == len(micro_batches) - 1)
            loss, sums, gap = self._loss_of(micro, temperature, loss_options, with_reference=reference)
            self._backward(loss * (self._world_size / self._ranks_per_share / num_tokens))
            totals["sum/tokens"] += len(micro.tokens)
            totals["sum/trained_tokens"] += len(micro.targets)
            totals["max/logprob_gap"] = max(totals.get("max/logprob_gap", 0.0), gap)
            for name, value in {"loss": loss.detach(), **sums}.items():
                totals[f"sum/{name}"] = totals.get(f"sum/{name}", 0.0) + float(value)
        if self._rank % self._ranks_per_share:
            totals = {name: value for name, value in totals.items() if not name.startswith("sum/")}
        totals.update(self._update())
        totals.update(self._costs(micro_batches))
        totals["seconds"] = time.perf_counter() - started
        return totals

    def _check(self, micro_batches: Sequence[MicroBatch]) -> None:
        for micro in micro_batches:
            health.check_tokens(micro, self._vocabulary, model=self._model_path)

    def _costs(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """What a step took of this rank."""
        costs = {"max/memory_gib": health.peak_memory_gib(self._device)}
        if self._size is not None:
            costs["sum/flops"] = sum(map(self._size.flops, micro_batches)) / self._ranks_per_share
            peak = health.peak_flops(self._device, self._dtype)
            costs.update({"sum/peak_flops": peak} if peak else {})
        return costs

    def _loss_of(
        self, micro: MicroBatch, temperature: float, loss_options: dict[str, Any], *, with_reference: bool = True
    ) -> tuple[Tensor, dict[str, Tensor], float]:
        arguments = (*to_tensors(micro, self._device), temperature)
        with_entropy = bool(loss_options.get("entropy_coef"))
        logprobs, entropy = self._forward(*arguments, *([True] if with_entropy else []))
        reference = None
        if self._reference is not None and with_reference:
            with torch.no_grad():
                reference = self._reference(*arguments)[0]
        rollout_logprobs = self._tensor(micro.rollout_logprobs)
        weights = self._tensor(micro.weights)
        outputs = self._loss(
            LossInputs(
                logprobs=logprobs,
                rollout_logprobs=rollout_logprobs,
                advantages=self._tensor(micro.advantages),
                sequences=self._tensor(micro.sequences),
                ref_logprobs=reference,
                proximal_logprobs=None if micro.proximal_logprobs is None else self._tensor(micro.proximal_logprobs),
                weights=weights,
                entropy=entropy,
                **loss_options,
            )
        )
        if outputs.loss.shape != logprobs.shape:
            raise ValueError(
                f"the loss function returned a loss of shape {tuple(outputs.loss.shape)} for {len(logprobs)} tokens; "
                "return one number for each token, without summing"
            )
        loss = (outputs.loss * weights).sum()
        gaps = (logprobs.detach() - rollout_logprobs).abs()
        sums = {**outputs.sums, "entropy": entropy.detach().sum(), "logprob_gap": gaps.sum()}
        if "ratio" in sums:
            sums |= health.ratio_shares(logprobs, rollout_logprobs)
        return loss, sums, float(gaps.max()) if len(gaps) else 0.0

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def infer(
        self, micro_batches: Sequence[MicroBatch], *, temperature: float, reference: bool = False
    ) -> list[NDArray[np.float32]]:
        """What the network says of the trained tokens of each micro-batch [N]: log-probs, or a critic's values.

        With `reference` it is the frozen policy that says it. Credit assignment that needs such numbers happens before
        a step, in the driver.
        """
        assert not reference or self._reference is not None, "the learner was started without a reference"
        self._check(micro_batches)
        found = []
        with torch.no_grad():
            for micro in micro_batches:
                arguments = (*to_tensors(micro, self._device), temperature)
                outputs = self._reference(*arguments) if reference and self._reference else self._forward(*arguments)
                found.append(outputs[0].float().cpu().numpy())
        return found

    def _update(self) -> dict[str, float]:
        lr = learning_rate(self._step, self._optimizer_config, self._total_steps)
        before = [shard.detach().clone() for shard in self._masters()]
        norm = self._apply(lr)
        self._step += 1
        self._skipped_in_a_row = 0 if math.isfinite(norm) else self._skipped_in_a_row + 1
        moved = health.norms(self._masters(), before, self._device)
        return {"grad_norm": norm, **moved, "lr": lr, "skipped_in_a_row": float(self._skipped_in_a_row)}

    def reset_reference(self) -> None:
        """Make the current policy the reference of the KL penalty."""
        assert self._reference is not None, "the learner was started without a reference"
        self._move_reference()
        self._reference_moved = True

    def open_weights(self, group: WeightGroup, *, backend: str, timeout: float) -> None:
        """Meet the engines; only rank 0 sends, the others help to gather."""
        self.leave_weights()
        if self._rank == 0:
            self._memory = self._memory or SharedWriter.where_it_fits(self._plan)
            self._sender = open_sender(backend, group, seconds=timeout, device=self._device, memory=self._memory)
            if not isinstance(self._sender, SharedSender):
                self._give_memory_back()

    def send_weights(self) -> dict[str, int]:
        """Send every parameter in the planned order; returns the checksum of each (empty but on rank 0)."""
        weights = self._full_weights()
        try:
            return {} if self._sender is None else self._sender.send(weights)
        finally:
            for _ in weights:  # the ranks gather together, also what can no longer be sent
                continue

    def published_weights(self) -> SharedPlace | None:
        """Where an engine on this host may read what was sent last, whenever it likes; None where nothing is shared."""
        return None if self._memory is None else self._memory.published

    def leave_weights(self) -> None:
        """Leave the engines' group; who still waits for weights there fails at once."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

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

    def _give_memory_back(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def close(self) -> None:
        """Leave all groups."""
        self.leave_weights()
        self._give_memory_back()
        if dist.is_initialized():
            dist.destroy_process_group()


def _copy_tokenizer(source: str, target: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(target)
