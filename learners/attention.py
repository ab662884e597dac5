"""Attention over a pack: exactly block-diagonal, and over a shared prompt once for all that continue it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface


class Layout(NamedTuple):
    """Where the segments of a pack are: `boundaries` [S+1], and for each the one that it continues or -1, [S].

    Those that continue a segment stand right behind it, one after another.
    """

    boundaries: list[int]
    prefixes: list[int]

    @property
    def segments(self) -> list[slice]:
        """The tokens of each segment."""
        return [slice(begin, end) for begin, end in itertools.pairwise(self.boundaries)]

    def continued(self) -> Iterator[tuple[slice, slice]]:
        """Each segment that others continue, and the tokens of all of these."""
        for prefix, group in itertools.groupby(range(len(self.prefixes)), key=self.prefixes.__getitem__):
            if prefix >= 0:
                members = list(group)
                yield self.segments[prefix], slice(self.boundaries[members[0]], self.boundaries[members[-1] + 1])


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

    Segments are attended one by one, each with the segment that it continues, so nothing is computed for pairs of
    different sequences and no mask of the pack is ever built.
    """
    if query.device.type == "cpu" and not dropout:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        result: Tensor = _PackedOnCpu.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
        return result.transpose(1, 2), None
    lengths = [segment.stop - segment.start for segment in layout.segments]
    # Split, not sliced: the backward pass of a slice fills a gradient of the whole pack.
    queries, keys, values = query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)

    def attend(index: int, prefix: int) -> Tensor:
        q, k, v = queries[index], keys[index], values[index]
        own = q.shape[2]
        if prefix >= 0:  # attended again, and what it finds dropped: a mask would cost the kernel's speed
            q, k, v = (torch.cat([of[prefix], mine], 2) for of, mine in ((queries, q), (keys, k), (values, v)))
        result = nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return result[:, :, -own:]

    parts = [attend(index, prefix) for index, prefix in enumerate(layout.prefixes)]
    return torch.cat(parts, dim=2).transpose(1, 2), None


class _PackedOnCpu(torch.autograd.Function):
    """The same by torch's CPU kernels, which also give the logarithm of the sum that a softmax divides by.

    With it, attention over the prompt and attention over a segment itself are put together to what attention over both
    would be, as ring attention does between devices (arXiv 2310.01889): so all segments that continue a prompt read it
    in one call, and nothing is computed for it again. The kernel's backward pass takes the sums of the whole, and gives
    each part's share of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        result = torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for own in layout.segments:
            result[:, :, own], sums[:, :, own] = _attend(query, key, value, own, own, scale, causal=True)
        for prompt, rest in layout.continued():
            seen, sum_seen = _attend(query, key, value, rest, prompt, scale, causal=False)
            whole = torch.logaddexp(sums[:, :, rest], sum_seen)
            share = torch.exp(sum_seen - whole)[..., None].to(seen.dtype)
            result[:, :, rest] = torch.lerp(result[:, :, rest], seen, share)
            sums[:, :, rest] = whole
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.layout, ctx.scale = layout, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, sums = ctx.saved_tensors
        found = [torch.empty_like(of) for of in (query, key, value)]

        def parts(of: slice, over: slice, *, causal: bool) -> Any:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, of],
                query[:, :, of],
                key[:, :, over],
                value[:, :, over],
                result[:, :, of],
                sums[:, :, of],
                0.0,
                causal,
                scale=ctx.scale,
            )

        for own in ctx.layout.segments:
            for whole, part in zip(found, parts(own, own, causal=True), strict=True):
                whole[:, :, own] = part
        for prompt, rest in ctx.layout.continued():
            for whole, part, where in zip(
                found, parts(rest, prompt, causal=False), (rest, prompt, prompt), strict=True
            ):
                whole[:, :, where] += part
        return *found, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, of: slice, over: slice, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """What some tokens find in others [1, H, L, D], and the logarithms of their sums [1, H, L]."""
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query[:, :, of], key[:, :, over], value[:, :, over], 0.0, causal, scale=scale
    )
    return found


AttentionInterface.register("rlsys_packed", packed_attention)
AttentionMaskInterface.register("rlsys_packed", lambda *_, **__: None)
