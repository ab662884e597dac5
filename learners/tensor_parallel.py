"""Tensor parallelism: ranks that compute the same tokens together, each with its part of every decoder layer."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from rlsys.errors import ConfigError
from rlsys.learners.model import PackedNetwork

_COLUMNS, _ROWS, _OF_OWN_HEADS = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""The words of transformers' plans that are known here. The last one is for norms of single heads: the weight is whole
on all ranks, and each uses it for its own heads only."""

_HEADS_AXIS = 2
"""Of the input of such a norm, [1, T, H, D]. In a family with [1, H, T, D] torch takes tokens for heads, which changes
nothing: the norm is of each row, and its gradient the sum over ranks."""

_COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Numbers of a model's config.json that are cut."""


def check_fits(network: PackedNetwork, size: int, *, model: str) -> None:
    """Find out whether so many ranks can share the layers of a network, which is not sharded yet.

    Raises:
        ConfigError: transformers has no plan for the model, or one that is not known here, or the layers cannot be cut
            into so many equal parts; names the number and the fix.
    """
    config = network.hf.config.get_text_config()  # type: ignore[union-attr,operator]
    words = set(_plan_of(network).values())
    unknown = sorted(words - {_COLUMNS, _ROWS, _OF_OWN_HEADS})
    if unknown or not words:
        reason = f"has a plan with {', '.join(unknown)}, which is not known here" if unknown else "has no plan"
        raise ConfigError(
            f"learners.options.tensor_parallel is {size}, but the layers of {model} cannot be cut: for "
            f"{config.model_type} transformers {reason}; set it to 1, where weights are sharded over all ranks as well"
        )
    counts = {name: getattr(config, name) for name in _COUNTS if isinstance(getattr(config, name, None), int)}
    for name, count in counts.items():
        if count % size:
            common = math.gcd(*counts.values())
            fitting = [str(number) for number in range(1, common + 1) if common % number == 0]
            raise ConfigError(
                f"learners.options.tensor_parallel is {size}, which does not divide the {name} of {model}, {count}; "
                f"for this model it may be {' or '.join(fitting)}"
            )


def cut_layers(network: PackedNetwork, ranks: DeviceMesh) -> None:
    """Leave each of the ranks its part of the layers, by transformers' own plan for the model (arXiv 1909.08053).

    The matrices behind a norm (queries, keys, values, gate, up) are cut by their outputs, so that a rank has whole
    heads of its own, and those that end a block (output, down) by their inputs; the ranks add up what these give.
    Everything else (embedding, norms, head) stays whole, gets the same input on all ranks and so the same gradient.
    """
    trained = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    decoder = network.hf.model
    assert isinstance(decoder, nn.Module)
    parallelize_module(decoder, ranks, _styles(decoder, _plan_of(network)), src_data_rank=None)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained[name])
    # A matrix that is cut twice is gathered in two steps; torch would say at each new shape that this takes two.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def _plan_of(network: PackedNetwork) -> Mapping[str, str]:
    """What transformers says of each module of the layers, by its name with `*` for the number of the layer."""
    config = network.hf.config.get_text_config()  # type: ignore[union-attr,operator]
    return {name: word for name, word in (config.base_model_tp_plan or {}).items() if name.startswith("layers.")}


def _styles(decoder: nn.Module, plan: Mapping[str, str]) -> dict[str, ParallelStyle]:
    """How to cut each module, by its name."""
    styles: dict[str, ParallelStyle] = {}
    for name, module in decoder.named_modules():
        word = plan.get(re.sub(r"\.\d+\.", ".*.", name))
        if word == _OF_OWN_HEADS:
            styles[name] = SequenceParallel(sequence_dim=_HEADS_AXIS, use_local_output=True)
        elif word is not None:
            style = ColwiseParallel if word == _COLUMNS else RowwiseParallel
            styles.update({matrix: style() for matrix in _matrices(name, module, word)})
    return styles


def _matrices(name: str, module: nn.Module, word: str) -> list[str]:
    """The matrices that are cut in place of a linear layer: itself or, beside adapters, it and the one of two.

    An adapter's `down` gives few numbers, which all ranks need, and its `up` takes them: so only that one is cut which
    has the long side in common with the frozen matrix.
    """
    if isinstance(module, nn.Linear):
        return [name]
    long = "lora_B" if word == _COLUMNS else "lora_A"
    return [f"{name}.base_layer", *(f"{name}.{long}.{adapter}" for adapter in getattr(module, long))]
