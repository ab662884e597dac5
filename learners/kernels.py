"""Kernels for GPUs that a policy may compute with in place of transformers' own layers."""

from __future__ import annotations

from typing import Any

from rlsys.config import LearnersConfig
from rlsys.errors import ConfigError

_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""The head is ours: it gives log-probs and entropies, which liger's losses do not."""


def use_kernels(hf: Any, config: LearnersConfig) -> None:
    """Give a model of transformers the attention and the layers that the configuration names.

    Raises:
        ConfigError: liger is not installed, or does not know this family of models.
    """
    if config.attention == "flex":
        import rlsys.learners.flex  # noqa: F401  # makes itself known to transformers

        hf.set_attn_implementation("rlsys_flex")
    if config.liger:
        _use_liger(hf)


def _use_liger(hf: Any) -> None:
    """Liger's norms, rotations and gated layers (arXiv 2410.10989)."""
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ConfigError(
            f"learners.liger needs liger-kernel ({error}); `pip install 'rlsys[gpu]'` brings it, or set it to false"
        ) from error
    family = hf.config.model_type
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"learners.liger: liger-kernel knows no model of the type {family!r}; set it to false")
    monkey_patch._apply_liger_kernel_to_instance(model=hf, **_OURS)
