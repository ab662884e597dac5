"""LoRA through peft: small trained matrices beside frozen ones, and what the two are together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rlsys.config import LoraConfig
from rlsys.errors import ConfigError

_NAME = "default"
_HEADS = ["lm_head", "score"]
_BASE, _DOWN, _UP = ".base_layer.", f".lora_A.{_NAME}.", f".lora_B.{_NAME}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What is added to a frozen matrix [out, in]: `scaling * up @ down`, by the names of both, [out, r] and [r, in]."""

    down: str
    up: str
    scaling: float


def add_adapters(hf: nn.Module, config: LoraConfig) -> None:
    """Put trained adapters beside the linear layers of a model in place, and freeze everything else.

    LoRA (arXiv 2106.09685): `up` begins at zero, so the model is still what it was; scaling is `alpha / rank`. A scalar
    head, which is new, is trained itself.

    Raises:
        ConfigError: peft is not installed, or the model has no layer of a name in `targets`.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("learners.lora needs peft; install it with `pip install 'rlsys[lora]'`") from error
    targets = "all-linear" if config.targets is None else list(config.targets)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        exclude_modules=_HEADS,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the ranks must begin with the same `down`, and so must a run that is made again
            inject_adapter_in_model(settings, hf, adapter_name=_NAME)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, module in hf.named_modules() if isinstance(module, nn.Linear)}
        raise ConfigError(
            f"learners.lora.targets {targets} are no layers of this model; its linear layers are called "
            f"{', '.join(sorted(linear))}"
        ) from error
    if hasattr(hf, "score"):
        hf.score.requires_grad_(True)


def set_adapters(network: nn.Module, *, enabled: bool) -> None:
    """Let the adapters count or not: without them the network is the model that training began with."""
    from peft.tuners.lora import LoraLayer

    for module in network.modules():
        if isinstance(module, LoraLayer):
            # Not `enable_adapters`, which also decides what has a gradient.
            module._disable_adapters = not enabled


def adapters(network: nn.Module) -> dict[str, Adapter]:
    """The adapters of a network's frozen matrices, by the names of these."""
    names = {name for name, _ in network.named_parameters()}
    found = {}
    for module_name, module in network.named_modules():
        base = f"{module_name}{_BASE}weight"
        if base in names:
            found[base] = Adapter(
                down=f"{module_name}{_DOWN}weight",
                up=f"{module_name}{_UP}weight",
                scaling=float(module.scaling[_NAME]),
            )
    return found


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter, and so of no `save_pretrained` folder."""
    return _DOWN in name or _UP in name


def published(name: str) -> str:
    """What a parameter is called in a folder that knows no adapters."""
    return name.replace(_BASE, ".")
