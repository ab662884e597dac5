"""From logits to log-probs and entropies of the trained tokens, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MIB = 2**20
_KEPT_BYTES, _KEPT_BYTES_ON_GPU = 512 * _MIB, 1024 * _MIB
"""A micro-batch whose float32 logits take at most so many bytes keeps them until its backward pass."""

_CHUNK_BYTES, _CHUNK_BYTES_ON_GPU = 128 * _MIB, 1024 * _MIB
"""Of a larger one, so many bytes of float32 logits exist at one time, and are computed twice. Each chunk also goes once
over the gradient of the whole head, which a GPU feels more than the memory."""

_BLOCK_BYTES, _BLOCK_BYTES_ON_GPU = _MIB // 2, 128 * _MIB
"""The size of a temporary: on a CPU it must stay in a core's cache, on a GPU a kernel must be worth its start."""

_NEVER = -1e6
"""Stands for the logarithm of probabilities that are 0 (`exp` of it is, too), because 0 * -inf is no number."""


def num_chunks(num_targets: int, vocabulary: int, *, on_gpu: bool = False) -> int:
    """How often the head runs for so many trained tokens; more than once where their logits are not to be kept."""
    row = 4 * vocabulary
    if num_targets * row <= (_KEPT_BYTES_ON_GPU if on_gpu else _KEPT_BYTES):
        return 1
    return -(-num_targets // max(1, (_CHUNK_BYTES_ON_GPU if on_gpu else _CHUNK_BYTES) // row))


class Head(nn.Linear):
    """An output layer that can be run in several chunks and add up its gradient in one place, see `summed_gradient`.

    An ordinary linear layer becomes one by its class, so that its parameters, its name and the hooks of sharding stay.
    """

    gradient: SummedGradient | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, D]."""
        if self.gradient is None or self.bias is not None:
            return super().forward(hidden)
        logits: Tensor = _Linear.apply(hidden, self.weight, self.gradient)
        return logits


class SummedGradient:
    """The gradient of a weight that one forward pass uses so many times: one buffer, handed over after the last use.

    Autograd would hold the sum, the next part and their new sum, each as large as the weight; and it would add parts of
    bfloat16 in bfloat16, where this sums in float32.
    """

    def __init__(self, num_uses: int) -> None:
        self._num_uses = self._left = num_uses
        self._sum: Tensor | None = None

    def add(self, of_logits: Tensor, hidden: Tensor) -> Tensor | None:
        """Add what one use gives to the gradient, [V, D]; returns the whole if it was the last."""
        precise = torch.promote_types(hidden.dtype, torch.float32)
        if self._sum is None:
            self._sum = (of_logits.t() @ hidden).to(precise)
        elif hidden.dtype == precise:
            self._sum.addmm_(of_logits.t(), hidden)
        else:
            self._sum += of_logits.t() @ hidden
        self._left -= 1
        if self._left:
            return None
        whole, self._sum, self._left = self._sum, None, self._num_uses
        return whole.to(hidden.dtype)


@contextmanager
def summed_gradient(head: nn.Module, gradient: SummedGradient | None) -> Iterator[None]:
    """Inside, calls of the head leave their gradient there; one that is no `Head` leaves it to autograd."""
    if isinstance(head, Head):
        head.gradient = gradient
    try:
        yield
    finally:
        if isinstance(head, Head):
            head.gradient = None


class _Linear(torch.autograd.Function):
    """`hidden @ weight.T`, whose gradient of the weight goes through a `SummedGradient`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, gradient: SummedGradient) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.gradient = gradient
        return nn.functional.linear(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logits: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        of_hidden = of_logits @ weight if ctx.needs_input_grad[0] else None
        of_weight = ctx.gradient.add(of_logits, hidden) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight, None


def token_logprobs(
    logits: Tensor, labels: Tensor, temperature: float, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of `labels` [n] under `logits` [n, V] / temperature, and entropies; both [n], float32 at least.

    The backward pass writes the gradient over the logits, so they must be the caller's to give away and nothing else
    may read them later; a second backward pass through them is an error. Entropies carry a gradient only with
    `entropy_gradient`. A logit of -inf is a token that cannot be: its probability and its part of the entropy are 0.
    """
    logprobs, entropies = _TokenLogprobs.apply(logits, labels, temperature, entropy_gradient)  # type: ignore[no-untyped-call]
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    """With z = logits / T, y = z - logsumexp(z) and p = exp(y): y at the label, and H = -sum p y.

    dy[label]/dlogits = (onehot - p) / T and dH/dlogits = -p (y + H) / T. Only the logits, one logsumexp a row and, for
    the second, one H a row are kept; a few rows at a time, so that what is in between never leaves the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprobs, entropies, normalisers = (
            torch.empty(len(logits), dtype=dtype, device=logits.device) for _ in range(3)
        )
        shifted, exponentials = _scratch(logits, 2)
        for rows in _blocks(logits):
            block = logits[rows]
            z, e = shifted[: len(block)], exponentials[: len(block)]
            highest = block.amax(-1, keepdim=True).to(dtype) / temperature
            torch.add(-highest, block, alpha=1 / temperature, out=z)
            torch.exp(z, out=e)
            total = e.sum(-1)
            logprobs[rows] = z.gather(-1, labels[rows, None])[:, 0] - total.log()
            normalisers[rows] = highest[:, 0] + total.log()
            entropies[rows] = total.log() - torch.linalg.vecdot(e, z.clamp_(min=_NEVER)) / total
        ctx.save_for_backward(logits, labels, normalisers, *([entropies] if entropy_gradient else []))
        ctx.temperature = temperature
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_logprobs is None and of_entropies is None:
            return None, None, None, None
        logits, labels, normalisers, *entropies = ctx.saved_tensors
        gradient = logits.detach()
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(normalisers)
        for_label = (of_logprobs.to(normalisers.dtype) / ctx.temperature)[:, None]
        probabilities, terms = _scratch(logits, 2)
        for rows in _blocks(logits):
            block = gradient[rows]
            y, p = terms[: len(block)], probabilities[: len(block)]
            torch.add(-normalisers[rows, None], block, alpha=1 / ctx.temperature, out=y)
            torch.exp(y, out=p)
            if of_entropies is None:
                p.mul_(-for_label[rows])
            else:
                for_entropy = (of_entropies[rows].to(p.dtype) / ctx.temperature)[:, None]
                y.clamp_(min=_NEVER).add_(entropies[0][rows, None])
                p.mul_(y.mul_(-for_entropy).sub_(for_label[rows]))
            p.scatter_add_(-1, labels[rows, None], for_label[rows])
            block.copy_(p)
        return gradient, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """The rows, a few at a time."""
    step = _rows(logits)
    return [slice(begin, begin + step) for begin in range(0, len(logits), step)]


def _rows(logits: Tensor) -> int:
    size = _BLOCK_BYTES if logits.device.type == "cpu" else _BLOCK_BYTES_ON_GPU
    return max(1, size // (4 * max(1, logits.shape[1])))


def _scratch(logits: Tensor, count: int) -> Tensor:
    """Room for so many blocks in the dtype of the computation."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty(count, min(len(logits), _rows(logits)), logits.shape[1], dtype=dtype, device=logits.device)
