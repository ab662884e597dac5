"""The policy as the learner runs it: any causal language model of transformers, packed, with a chunked head."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from rlsys.packing import MicroBatch

_HEAD_CHUNK = 2048
"""Trained tokens whose logits exist at one time; memory is this times the vocabulary."""

_LONG_PREFIX = 3
"""A prefix this many times longer than what follows is read through a mask. A shorter one is attended again and the
results dropped, which is cheaper: with a mask, CPU kernels also compute what it hides."""


class Layout(NamedTuple):
    """Where the segments of a pack are: `boundaries` [S+1], and for each the one that it continues or -1, [S]."""

    boundaries: list[int]
    prefixes: list[int]


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack; query [1, H, T, D], result [1, T, H, D].

    Exactly block-diagonal: segments are attended one by one, each with the segment that it continues, so nothing is
    computed for pairs of different sequences and no mask of the pack is ever built.
    """
    lengths = [end - begin for begin, end in itertools.pairwise(layout.boundaries)]
    # Split, not sliced: the backward pass of a slice fills a gradient of the whole pack.
    queries, keys, values = query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)

    def attend(index: int, prefix: int) -> Tensor:
        q, k, v = queries[index], keys[index], values[index]
        own, mask = q.shape[2], None
        if prefix >= 0:
            before = lengths[prefix]
            k, v = torch.cat([keys[prefix], k], 2), torch.cat([values[prefix], v], 2)
            if before > _LONG_PREFIX * own:
                mask = torch.ones(own, before + own, dtype=torch.bool, device=q.device).tril(before)
            else:
                q = torch.cat([queries[prefix], q], 2)
        result = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return result[:, :, -own:]

    parts = [attend(index, prefix) for index, prefix in enumerate(layout.prefixes)]
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("rlsys_packed", packed_attention)
AttentionMaskInterface.register("rlsys_packed", lambda *_, **__: None)


def num_chunks(num_targets: int) -> int:
    """How often the head runs for so many trained tokens."""
    return max(1, -(-num_targets // _HEAD_CHUNK))


class Policy(nn.Module):
    """Log-probs and entropies of the trained tokens of a micro-batch."""

    def __init__(self, hf: nn.Module, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.hf = hf
        self.least_chunks = 1
        """The head runs at least so often, on no tokens at last: for ranks that must run it equally often."""
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
        self, tokens: Tensor, positions: Tensor, layout: Layout, targets: Tensor, sources: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probs (with gradient) and entropies (without) of `targets` [N], both [N] float32.

        The head runs only where a token trains, and a chunk at a time: its logits are thrown away and computed again
        in the backward pass, so tokens x vocabulary never exists at once.
        """
        hidden = self.hf.model(  # type: ignore[operator]
            input_ids=tokens[None], position_ids=positions[None], layout=layout, use_cache=False
        )[0][0]
        before = hidden[sources]
        labels = tokens[targets]
        chunks = [
            checkpoint(
                self._head, before[i : i + _HEAD_CHUNK], labels[i : i + _HEAD_CHUNK], temperature, use_reentrant=False
            )
            for i in range(0, _HEAD_CHUNK * max(num_chunks(len(targets)), self.least_chunks), _HEAD_CHUNK)
        ]
        return torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[1] for chunk in chunks])

    def _head(self, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.hf.lm_head(hidden).float() / temperature  # type: ignore[operator]
        normalised = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(normalised.exp() * normalised).sum(-1)
        return normalised.gather(-1, labels[:, None])[:, 0], entropy


def to_tensors(micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Layout, Tensor, Tensor]:
    """Tokens, positions, layout, targets and sources as `Policy.forward` takes them.

    An empty micro-batch becomes one token that trains nothing: a sharded rank must run the same layers as the others.
    """
    tokens, positions = micro.tokens, micro.positions
    layout = Layout(micro.boundaries.tolist(), micro.prefixes.tolist())
    if not len(tokens):
        tokens, positions, layout = np.zeros(1, np.int32), np.zeros(1, np.int32), Layout([0, 1], [-1])
    return (
        torch.from_numpy(tokens.astype(np.int64)).to(device),
        torch.from_numpy(positions.astype(np.int64)).to(device),
        layout,
        torch.from_numpy(micro.targets.copy()).to(device),
        torch.from_numpy(micro.sources.copy()).to(device),
    )
