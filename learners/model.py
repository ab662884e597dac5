"""The policy as the learner runs it: any causal language model of transformers, packed, with a chunked head."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from rlsys.packing import MicroBatch

_HEAD_CHUNK = 2048
"""Trained tokens whose logits exist at one time; memory is this times the vocabulary."""


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    boundaries: list[int],
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack; query [1, H, T, D], result [1, T, H, D].

    Exactly block-diagonal: sequences are attended one by one, so nothing is computed for pairs of different
    sequences and no mask is ever built.
    """
    lengths = [end - begin for begin, end in itertools.pairwise(boundaries)]
    # Split, not sliced: the backward pass of a slice fills a gradient of the whole pack.
    parts = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("rlsys_packed", packed_attention)
AttentionMaskInterface.register("rlsys_packed", lambda *_, **__: None)


class Policy(nn.Module):
    """Log-probs and entropies of the trained tokens of a micro-batch."""

    def __init__(self, hf: nn.Module, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.hf = hf
        if activation_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    @classmethod
    def load(cls, path: str, *, activation_checkpointing: bool = False) -> Policy:
        """Load from a `save_pretrained` folder in float32 (the master weights)."""
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="rlsys_packed")
        return cls(hf, activation_checkpointing=activation_checkpointing)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers: the units of sharding."""
        layers = self.hf.model.layers  # type: ignore[union-attr]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def forward(
        self, tokens: Tensor, positions: Tensor, boundaries: list[int], targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (with gradient) and entropies (without) of `targets` [N], both [N] float32.

        The head runs only where a token trains, and a chunk at a time: its logits are thrown away and computed again
        in the backward pass, so tokens x vocabulary never exists at once.
        """
        hidden = self.hf.model(  # type: ignore[operator]
            input_ids=tokens[None], position_ids=positions[None], boundaries=boundaries, use_cache=False
        )[0][0]
        before = hidden[targets - 1]
        labels = tokens[targets]
        chunks = [
            checkpoint(
                self._head, before[i : i + _HEAD_CHUNK], labels[i : i + _HEAD_CHUNK], temperature, use_reentrant=False
            )
            for i in range(0, max(len(targets), 1), _HEAD_CHUNK)
        ]
        return torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[1] for chunk in chunks])

    def _head(self, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.hf.lm_head(hidden).float() / temperature  # type: ignore[operator]
        normalised = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(normalised.exp() * normalised).sum(-1)
        return normalised.gather(-1, labels[:, None])[:, 0], entropy


def to_tensors(micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, list[int], Tensor]:
    """Tokens, positions, boundaries and targets as `Policy.forward` takes them.

    An empty micro-batch becomes one token that trains nothing: a sharded rank must run the same layers as the others.
    """
    tokens, positions = micro.tokens, micro.positions
    boundaries = micro.boundaries.tolist()
    if not len(tokens):
        tokens, positions, boundaries = np.zeros(1, np.int32), np.zeros(1, np.int32), [0, 1]
    return (
        torch.from_numpy(tokens.astype(np.int64)).to(device),
        torch.from_numpy(positions.astype(np.int64)).to(device),
        boundaries,
        torch.from_numpy(micro.targets.copy()).to(device),
    )
