"""Attention over a pack by FlexAttention: one kernel for the whole pack, made for its mask (arXiv 2412.05496)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from rlsys.learners.attention import Layout


def flex_packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    layout: Layout,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack; query [1, H, T, D], key and value [1, H', T, D], result
    [1, T, H, D].

    Blocks of the mask in which nothing may be seen are left out, so pairs of different sequences cost nothing, and a
    shared prompt is read by all that continue it. On GPUs the kernel is compiled, once for each number of dimensions;
    elsewhere it is torch's plain form of the same, which is for tests: it holds a number for each pair of tokens.
    """
    mask = _block_mask(tuple(layout.boundaries), tuple(layout.prefixes), query.device)
    result = _kernel(query.device.type)(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return result.transpose(1, 2), None


@functools.lru_cache(maxsize=4)  # of a forward pass all layers, and its recomputation, ask for the same
def _block_mask(boundaries: tuple[int, ...], prefixes: tuple[int, ...], device: torch.device) -> BlockMask:
    """Which token sees which: those of its own segment and of the one that this continues, up to itself."""
    lengths = torch.tensor(boundaries, device=device).diff()
    segments = torch.repeat_interleave(torch.arange(len(prefixes), device=device), lengths)
    continued = torch.tensor(prefixes, device=device)[segments]

    def seen(_batch: Tensor, _head: Tensor, at: Tensor, other: Tensor) -> Tensor:
        mine = (segments[at] == segments[other]) | (continued[at] == segments[other])
        return (at >= other) & mine

    # Compiled, the mask of all pairs of tokens is never held.
    return create_block_mask(
        seen, None, None, boundaries[-1], boundaries[-1], device=device, _compile=device.type != "cpu"
    )


@functools.cache
def _kernel(device_type: str) -> Callable[..., Any]:
    if device_type == "cpu":
        return flex_attention
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


AttentionInterface.register("rlsys_flex", flex_packed_attention)
AttentionMaskInterface.register("rlsys_flex", lambda *_, **__: None)
