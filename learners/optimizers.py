"""Optimizers of a learner and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rlsys.config import OptimizerConfig
from rlsys.learners.model import PackedNetwork


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of the step with this index (0-based): linear warm-up, then constant or cosine to a tenth."""
    warmup = config.warmup_of(total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizers(network: PackedNetwork, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """What updates the network's weights, each weight by one of them; the weights may be sharded.

    With `muon` the matrices of the decoder layers get Muon (https://kellerjordan.github.io/posts/muon): its update is
    scaled to the size that AdamW's has, 0.2 x sqrt(the longer side) (arXiv 2502.16982), so that both share one rate.
    """
    if config.kind == "adamw":
        return [adamw((weight for weight in network.parameters() if weight.requires_grad), config)]
    matrices = [weight for weight in network.layers.parameters() if weight.requires_grad and weight.ndim == 2]
    chosen = set(map(id, matrices))
    return [
        torch.optim.Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        adamw((w for w in network.parameters() if w.requires_grad and id(w) not in chosen), config),
    ]


def adamw(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in one kernel."""
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)
