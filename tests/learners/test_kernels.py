"""Kernels for GPUs: what of them can be proved without one, and, where there is one, their gradients."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsys.config import LearnersConfig
from rlsys.errors import ConfigError
from rlsys.learners.attention import Layout, packed_attention
from rlsys.learners.flex import _block_mask, flex_packed_attention
from rlsys.learners.kernels import use_kernels
from rlsys.learners.model import Policy
from rlsys.scratch import ScratchModel, build_scratch_model

LAYOUTS = [
    Layout(boundaries=[0, 7], prefixes=[-1]),
    Layout(boundaries=[0, 3, 4, 11], prefixes=[-1, -1, -1]),
    # a prompt of 5 that three continue, then two that stand alone
    Layout(boundaries=[0, 5, 9, 10, 16, 20, 21], prefixes=[-1, 0, 0, 0, -1, -1]),
    # more than one block of the kernel
    Layout(boundaries=[0, 130, 190, 300], prefixes=[-1, 0, 0]),
]
PLAIN = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def drawn(layout: Layout, num_kv_heads: int, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = layout.boundaries[-1]
    return [torch.randn(1, count, length, 16, generator=generator).to(device) for count in (4, *[num_kv_heads] * 2)]


@PLAIN
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flex_attention_finds_what_our_own_finds(layout: Layout, num_kv_heads: int) -> None:
    inputs = drawn(layout, num_kv_heads)
    ours, flexible = (
        attention(torch.nn.Identity(), *inputs, None, scaling=0.3, layout=layout)[0]
        for attention in (packed_attention, flex_packed_attention)
    )
    torch.testing.assert_close(flexible, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flex_attention_has_the_gradients_of_our_own(layout: Layout, num_kv_heads: int) -> None:
    found = []
    for attention in (packed_attention, flex_packed_attention):
        inputs = [of.requires_grad_() for of in drawn(layout, num_kv_heads, "cuda")]
        result, _ = attention(torch.nn.Identity(), *inputs, None, scaling=0.3, layout=layout)
        result.square().sum().backward()
        found.append([result.detach(), *(of.grad for of in inputs)])
    for ours, flexible in zip(*found, strict=True):
        torch.testing.assert_close(flexible, ours, rtol=1e-2, atol=1e-2)


@PLAIN
def test_a_token_sees_nothing_of_other_sequences() -> None:
    layout = LAYOUTS[2]
    query, key, value = drawn(layout, 2)
    before, _ = flex_packed_attention(torch.nn.Identity(), query, key, value, None, layout=layout)
    value[:, :, 10:16] += 1  # the third that continues the prompt
    after, _ = flex_packed_attention(torch.nn.Identity(), query, key, value, None, layout=layout)
    changed = (before != after).any(dim=(0, 2, 3)).nonzero().flatten().tolist()
    assert changed == list(range(10, 16))


def test_blocks_in_which_nothing_may_be_seen_are_left_out() -> None:
    apart = _block_mask(tuple(range(0, 1025, 128)), (-1,) * 8, torch.device("cpu"))
    together = _block_mask((0, 1024), (-1,), torch.device("cpu"))
    assert int(apart.kv_num_blocks.sum() + apart.full_kv_num_blocks.sum()) == 8
    assert int(together.kv_num_blocks.sum() + together.full_kv_num_blocks.sum()) == 8 * 9 // 2


@PLAIN
def test_a_policy_with_flex_attention_gives_the_same_logprobs(tmp_path: Path) -> None:
    folder = str(build_scratch_model(tmp_path / "model", ScratchModel(hidden_size=32, num_heads=2, num_kv_heads=1)))
    policy = Policy.load(folder)
    layout = LAYOUTS[2]
    tokens = torch.arange(21) + 20
    positions = torch.cat([torch.arange(5), *(torch.arange(5, 5 + n) for n in (4, 1, 6)), *map(torch.arange, (4, 1))])
    sources = torch.tensor([6, 9, 14, 18])

    def logprobs() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = policy(tokens, positions, layout, sources + 1, sources, 1.0)[0]
        return found

    before = logprobs()
    use_kernels(policy.hf, LearnersConfig(attention="flex", gpus=1))
    torch.testing.assert_close(logprobs(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("attention", "flex"), ("liger", True)])
def test_kernels_for_gpus_are_refused_without_one(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"learners\.gpus is 0"):
        LearnersConfig(**{name: value})


class FakeLiger:
    """Stands in for the package, which cannot be imported without Triton; notes how it is called."""

    def __init__(self) -> None:
        self.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": None}
        self.calls: list[Any] = []

    def _apply_liger_kernel_to_instance(self, **arguments: Any) -> None:
        self.calls.append(arguments)


class FakeModel:
    def __init__(self, model_type: str) -> None:
        self.config = types.SimpleNamespace(model_type=model_type)


def test_liger_gets_the_layers_and_never_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, config = FakeLiger(), LearnersConfig(liger=True, gpus=1)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    package = types.ModuleType("liger_kernel.transformers")
    package.monkey_patch = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    model = FakeModel("qwen2")
    use_kernels(model, config)
    assert fake.calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    with pytest.raises(ConfigError, match="knows no model of the type 'gpt2'"):
        use_kernels(FakeModel("gpt2"), config)


def test_liger_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match="pip install"):
        use_kernels(FakeModel("qwen2"), LearnersConfig(liger=True, gpus=1))
