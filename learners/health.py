"""What a step says of its own health, and input that a step cannot be made of."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlsys.errors import DataError
from rlsys.learners.model import PackedNetwork
from rlsys.packing import MicroBatch

RATIO_EDGES = (0.5, 0.8, 1.25, 2.0)
RATIO_SHARES = ("ratio_below_0.5", "ratio_0.5_to_0.8", "ratio_0.8_to_1.25", "ratio_1.25_to_2", "ratio_above_2")
"""Names of the bins between the edges; an edge belongs to the bin above it."""

_PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
)
"""Part of a device's name, and its dense bfloat16 FLOP/s by its maker's data sheet; the first that fits counts."""


def ratio_shares(logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Tensor]:
    """How many of the tokens [N] have each importance ratio, exp(logprobs - rollout_logprobs), by `RATIO_SHARES`."""
    edges = torch.tensor([math.log(edge) for edge in RATIO_EDGES], device=logprobs.device)
    bins = torch.bucketize(logprobs.detach() - rollout_logprobs, edges, right=True)
    counts = torch.bincount(bins, minlength=len(RATIO_SHARES)).float()
    return dict(zip(RATIO_SHARES, counts.unbind(), strict=True))


def norms(now: Sequence[Tensor], before: Sequence[Tensor], device: torch.device) -> dict[str, float]:
    """Norms of the weights and of what they moved, over the shards of all ranks; `before` is used up."""
    for old, new in zip(before, now, strict=True):
        old.sub_(new)
    parameter_norm, update_norm = total_norms(now, before, device=device)
    return {"parameter_norm": parameter_norm, "update_norm": update_norm}


def total_norms(*tensors: Sequence[Tensor], device: torch.device) -> list[float]:
    """The norm of each of these lists of shards over all ranks, where every element is on one of them only."""
    mine = [torch.nn.utils.get_total_norm(list(shards)).to(device, torch.float64) ** 2 for shards in tensors]
    squares = torch.stack(mine)
    dist.all_reduce(squares)
    found: list[float] = squares.sqrt().tolist()
    return found


# --- memory and speed ------------------------------------------------------------------------------------------------


def forget_peak_memory(device: torch.device) -> None:
    """Begin to measure the peak anew, where that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process had: of tensors on a GPU since it was forgotten, else resident since birth."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU that is known; None for any other device or dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return named_peak_flops(torch.cuda.get_device_name(device))


def named_peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a whole GPU of this name, None where it is not known."""
    return None if "MIG" in name else next((peak for part, peak in _PEAK_FLOPS if part in name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What the floating-point operations of a dense decoder depend on. `attention_width` is heads x their size."""

    layer_parameters: int
    head_parameters: int
    num_layers: int
    attention_width: int

    @classmethod
    def of(cls, network: PackedNetwork) -> ModelSize | None:
        """That of a network which is not sharded yet; None for a mixture of experts, where not every weight works."""
        config = network.hf.config.get_text_config()  # type: ignore[union-attr,operator]
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        head = getattr(network.hf, "lm_head", None) or getattr(network.hf, "score", None)
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layer_parameters=sum(parameter.numel() for parameter in network.layers.parameters()),
            head_parameters=sum(parameter.numel() for parameter in head.parameters()) if head is not None else 0,
            num_layers=len(network.layers),
            attention_width=config.num_attention_heads * size,
        )

    def flops(self, micro: MicroBatch) -> float:
        """Forward and backward pass of a micro-batch as it is computed: prompts that are shared count once.

        6 for each weight of the layers and token, 6 for each weight of the head and token that trains, and
        12 x layers x width for each pair of a token and one that it attends to (causal: itself and all before it).
        Recomputed activations and the frozen reference count nothing. Palm's (arXiv 2204.02311) model FLOPs, but that
        there every token attends to all of its sequence and the head runs on all.
        """
        weights = self.layer_parameters * len(micro.tokens) + self.head_parameters * len(micro.targets)
        pairs = float(micro.positions.sum(dtype=np.int64)) + len(micro.positions)
        return 6.0 * weights + 12.0 * self.num_layers * self.attention_width * pairs


# --- bad input -------------------------------------------------------------------------------------------------------


def vocabulary_of(network: nn.Module) -> int:
    """How many token ids the network knows; before it is sharded."""
    embedding = network.hf.get_input_embeddings()  # type: ignore[union-attr,operator]
    return int(embedding.weight.shape[0])


def check_tokens(micro: MicroBatch, vocabulary: int, *, model: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        DataError: names the id and the size of the vocabulary.
    """
    if not len(micro.tokens):
        return
    for token in (int(micro.tokens.max()), int(micro.tokens.min())):
        if not 0 <= token < vocabulary:
            raise DataError(
                f"a rollout has the token id {token}, but the vocabulary of {model} is {vocabulary} "
                f"(ids 0 to {vocabulary - 1}): what wrote it and the learner do not have the same model; compare "
                "`vocab_size` in its config.json with the tokenizer, and look at what the engines loaded"
            )
