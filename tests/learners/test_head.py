"""Logits to log-probs and entropies against PyTorch's own functions: values, gradients, and what may not be done."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlsys.learners import head
from rlsys.learners.head import Head, SummedGradient, num_chunks, summed_gradient, token_logprobs

INFINITY = math.inf
VOCABULARY = 13


def plain(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same in PyTorch's own functions."""
    normalised = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    entropies = -torch.where(normalised.isinf(), 0.0, normalised.exp() * normalised).sum(-1)
    return normalised.gather(-1, labels[:, None])[:, 0], entropies


def some(rows: int, *, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and a label for each row."""
    generator = torch.Generator().manual_seed(rows)
    logits = scale * torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, VOCABULARY, (rows,), generator=generator)


def gradients(logits: Tensor, labels: Tensor, temperature: float, *, ours: bool, entropy_gradient: bool) -> Tensor:
    """Of a sum in which every log-prob, and with `entropy_gradient` every entropy, has a weight of its own."""
    leaf = logits.clone().requires_grad_()
    if ours:
        logprobs, entropies = token_logprobs(leaf * 1, labels, temperature, entropy_gradient=entropy_gradient)
    else:
        logprobs, entropies = plain(leaf * 1, labels, temperature)
    weights = torch.linspace(-1, 2, len(labels), dtype=logprobs.dtype)
    total = (weights * logprobs).sum()
    if entropy_gradient:
        total = total + (weights.flip(0) * entropies).sum()
    total.backward()
    assert leaf.grad is not None
    return leaf.grad


def test_golden_numbers() -> None:
    # Probabilities 1/2, 1/4, 1/4: entropy 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2. At temperature 1/2 the odds are squared:
    # 4 : 1 : 1, probabilities 2/3, 1/6, 1/6, entropy 2/3 ln 1.5 + 1/3 ln 6.
    logits = torch.tensor([[math.log(2), 0.0, 0.0]])
    logprob, entropy = token_logprobs(logits, torch.tensor([0]), 1.0)
    assert float(logprob) == pytest.approx(math.log(1 / 2))
    assert float(entropy) == pytest.approx(1.5 * math.log(2))
    logprob, entropy = token_logprobs(logits, torch.tensor([2]), 0.5)
    assert float(logprob) == pytest.approx(math.log(1 / 6))
    assert float(entropy) == pytest.approx(2 / 3 * math.log(1.5) + 1 / 3 * math.log(6))


def test_golden_gradients() -> None:
    # Probabilities 1/2, 1/4, 1/4 at temperature 2, label 0. Log-prob: (1 - 1/2, -1/4, -1/4) / 2. Entropy 1.5 ln 2 with
    # log-probs -ln 2 and -2 ln 2: -1/2 (0.5 ln 2) and -1/4 (-0.5 ln 2), both / 2.
    logits = torch.tensor([[2 * math.log(2), 0.0, 0.0]], requires_grad=True)
    token_logprobs(logits * 1, torch.tensor([0]), 2.0)[0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([0.25, -0.125, -0.125])
    logits.grad = None
    token_logprobs(logits * 1, torch.tensor([0]), 2.0, entropy_gradient=True)[1].sum().backward()
    assert logits.grad is not None
    half = math.log(2) / 8
    assert logits.grad[0].tolist() == pytest.approx([-half, half / 2, half / 2])


@pytest.mark.parametrize("block_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(
    rows: int, temperature: float, entropy_gradient: bool, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_BLOCK_BYTES", block_rows * 4 * VOCABULARY)
    logits, labels = some(rows)
    before = logits.clone()
    found = token_logprobs(logits, labels, temperature)
    for mine, theirs in zip(found, plain(logits, labels, temperature), strict=True):
        assert mine.shape == (rows,)
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert torch.equal(logits, before), "only the backward pass may write"
    mine, theirs = (
        gradients(logits, labels, temperature, ours=ours, entropy_gradient=entropy_gradient) for ours in (True, False)
    )
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_float32_is_as_precise_as_log_softmax_even_far_from_zero() -> None:
    logits, labels = some(50, dtype=torch.float32, scale=10.0)
    for offset in (0.0, 1000.0, -1000.0):
        moved = logits + offset
        exact, exact_entropies = plain(moved.double(), labels, 0.9)
        logprobs, entropies = token_logprobs(moved, labels, 0.9)
        theirs, their_entropies = plain(moved, labels, 0.9)
        assert logprobs.dtype == entropies.dtype == torch.float32
        bound = max(1e-6, 2 * float((theirs - exact).abs().max()))
        torch.testing.assert_close(logprobs.double(), exact, atol=bound, rtol=0)
        bound = max(1e-6, 2 * float((their_entropies - exact_entropies).abs().max()))
        torch.testing.assert_close(entropies.double(), exact_entropies, atol=bound, rtol=0)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_bfloat16_logits_are_computed_with_in_float32(entropy_gradient: bool) -> None:
    logits, labels = some(20, dtype=torch.bfloat16)
    found = token_logprobs(logits, labels, 0.7)
    for mine, theirs in zip(found, plain(logits.float(), labels, 0.7), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=0)
    mine = gradients(logits, labels, 0.7, ours=True, entropy_gradient=entropy_gradient)
    exact = gradients(logits.float(), labels, 0.7, ours=False, entropy_gradient=entropy_gradient)
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), exact, atol=1e-6, rtol=2**-8, msg="rounded once, at the end")


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be(dtype: torch.dtype, entropy_gradient: bool) -> None:
    logits, labels = some(6, dtype=dtype)
    few = logits[:, :10].contiguous()
    labels = labels.clamp(max=9)
    logits[:, 10:] = -INFINITY
    for mine, theirs in zip(token_logprobs(logits, labels, 0.7), token_logprobs(few, labels, 0.7), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    mine = gradients(logits, labels, 0.7, ours=True, entropy_gradient=entropy_gradient)
    theirs = gradients(few, labels, 0.7, ours=True, entropy_gradient=entropy_gradient)
    assert not mine[:, 10:].any()
    torch.testing.assert_close(mine[:, :10], theirs, atol=1e-6, rtol=2**-8)
    assert float(token_logprobs(logits, torch.full((6,), 12), 1.0)[0].max()) == -INFINITY


def test_a_sure_token_has_no_entropy_and_no_gradient() -> None:
    logits, labels = torch.full((1, VOCABULARY), -INFINITY), torch.tensor([4])
    logits[0, 4] = 3.0
    logprob, entropy = token_logprobs(logits, labels, 1.0)
    assert (float(logprob), float(entropy)) == (0.0, 0.0)
    assert not gradients(logits, labels, 1.0, ours=True, entropy_gradient=True).any()


@pytest.mark.parametrize("value", [math.nan, INFINITY])
def test_logits_that_are_no_numbers_are_not_hidden(value: float) -> None:
    logits, labels = some(3, dtype=torch.float32)
    logits[1, 2] = value
    logprobs, entropies = token_logprobs(logits, labels, 1.0)
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False]


def test_entropies_have_a_gradient_only_where_it_was_asked_for() -> None:
    logits, labels = some(3)
    leaf = logits.requires_grad_()
    assert not token_logprobs(leaf * 1, labels, 1.0)[1].requires_grad
    assert token_logprobs(leaf * 1, labels, 1.0, entropy_gradient=True)[1].requires_grad


def test_a_second_backward_pass_is_an_error_and_no_wrong_number() -> None:
    logits, labels = some(3)
    logprobs, _ = token_logprobs(logits.requires_grad_() * 1, labels, 1.0)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


def test_a_gradient_of_a_gradient_is_an_error() -> None:
    logits, labels = some(3)
    leaf = logits.requires_grad_()
    logprobs, _ = token_logprobs(leaf * 1, labels, 1.0)
    (gradient,) = torch.autograd.grad((logprobs**2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- in chunks -------------------------------------------------------------------------------------------------------


def test_logits_of_half_a_gibibyte_are_kept_and_more_come_in_pieces_of_an_eighth() -> None:
    # One row of 151,936 float32 is 607,744 bytes: 883 of them are 511.8 MiB, and 220 are 127.5 MiB.
    assert num_chunks(883, 151_936) == 1
    assert num_chunks(884, 151_936) == math.ceil(884 / 220) == 5
    assert num_chunks(8192, 151_936) == math.ceil(8192 / 220) == 38
    # A row of 2^16 float32 is a quarter of a MiB.
    assert num_chunks(2048, 2**16) == 1
    assert num_chunks(2049, 2**16) == math.ceil(2049 / 512) == 5
    assert num_chunks(0, 151_936) == 1
    assert num_chunks(1, 2**40) == 1, "a row is the least there is"
    assert num_chunks(4096, 2**16, on_gpu=True) == 1
    assert num_chunks(4097, 2**16, on_gpu=True) == 2


def chunked(layer: nn.Linear, hidden: Tensor, labels: Tensor, chunks: int, gradient: SummedGradient | None) -> Tensor:
    """Log-probs by a head in chunks whose logits are computed twice."""

    def run(hidden: Tensor, labels: Tensor) -> Tensor:
        with summed_gradient(layer, gradient):
            logits = layer(hidden)
        return token_logprobs(logits, labels, 0.8)[0]

    parts = zip(hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True)
    return torch.cat([checkpoint(run, *part, use_reentrant=False) for part in parts])


def layers(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[nn.Linear, nn.Linear]:
    """The same layer as a `Head` and as it was."""
    torch.manual_seed(0)
    mine, theirs = (nn.Linear(5, VOCABULARY, bias=bias, dtype=dtype) for _ in range(2))
    mine.load_state_dict(theirs.state_dict())
    mine.__class__ = Head
    return mine, theirs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 9, 30])
def test_a_gradient_summed_over_chunks_is_that_of_one_piece(chunks: int, bias: bool) -> None:
    mine, theirs = layers(bias=bias)
    hidden, labels = torch.randn(20, 5), some(20)[1]
    weights = torch.linspace(-1, 2, 20)
    left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (chunked(mine, left, labels, chunks, SummedGradient(chunks)) * weights).sum().backward()
    (plain(theirs(right), labels, 0.8)[0] * weights).sum().backward()
    torch.testing.assert_close(left.grad, right.grad)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_weight_gets_its_gradient_once_for_all_chunks() -> None:
    layer, _ = layers()
    arrived: list[Tensor] = []
    layer.weight.register_hook(arrived.append)
    made: list[int] = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: made.append(len(weight)))
    chunked(layer, torch.randn(20, 5), some(20)[1], 4, SummedGradient(4)).sum().backward()
    assert (len(arrived), len(made)) == (1, 1)


def test_chunks_can_go_backward_twice() -> None:
    layer, _ = layers()
    logprobs = chunked(layer, torch.randn(20, 5), some(20)[1], 4, SummedGradient(4))
    logprobs.sum().backward(retain_graph=True)
    assert layer.weight.grad is not None
    once = layer.weight.grad.clone()
    logprobs.sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)


def test_a_frozen_head_passes_its_gradient_on_and_gets_none() -> None:
    mine, theirs = layers()
    mine.requires_grad_(False)
    hidden, labels = torch.randn(20, 5), some(20)[1]
    left, right = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    chunked(mine, left, labels, 4, SummedGradient(4)).sum().backward()
    plain(theirs(right), labels, 0.8)[0].sum().backward()
    torch.testing.assert_close(left.grad, right.grad)
    assert mine.weight.grad is None


def test_parts_of_bfloat16_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    of_logits, hidden = torch.randn(512, 7).bfloat16(), torch.randn(512, 5).bfloat16()
    gradient = SummedGradient(512)
    parts = [gradient.add(of_logits[i : i + 1], hidden[i : i + 1]) for i in range(512)]
    assert all(part is None for part in parts[:-1])
    whole = parts[-1]
    assert whole is not None
    assert whole.dtype == torch.bfloat16
    exact = of_logits.double().t() @ hidden.double()
    # Each part is rounded to 8 bits and the sum once more: some hundredths. Sums in bfloat16 are ten times further off.
    torch.testing.assert_close(whole.double(), exact, atol=0.15, rtol=2**-8)


def test_outside_of_a_sum_a_head_is_a_linear_layer() -> None:
    mine, theirs = layers()
    with pytest.raises(ValueError, match="on purpose"), summed_gradient(mine, SummedGradient(2)):
        raise ValueError("on purpose")
    hidden = torch.randn(3, 5)
    assert torch.equal(mine(hidden), theirs(hidden))
    mine(hidden).sum().backward()
    assert mine.weight.grad is not None
