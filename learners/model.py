"""The networks that a learner runs on packs: any causal language model of transformers, and one with a scalar head."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from rlsys.chat import load_tokenizer
from rlsys.config import LoraConfig
from rlsys.errors import ConfigError
from rlsys.learners.attention import Layout
from rlsys.learners.head import Head, SummedGradient, num_chunks, summed_gradient, token_logprobs
from rlsys.learners.lora import add_adapters
from rlsys.packing import MicroBatch

_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Settings by which some families change what their output layer gives; the head here would leave that out."""


class PackedNetwork(nn.Module, ABC):
    """A decoder of transformers on the tokens of a pack, and a head on those of its hidden states that are read.

    Called with what `to_tensors` makes of a micro-batch and a temperature; returns two arrays of one number for each of
    the N trained tokens, float32.
    """

    def __init__(self, hf: nn.Module, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.hf = hf
        self.least_chunks = 1
        """The head runs at least so often, on no tokens at last: for ranks that must run it equally often."""
        if activation_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    @classmethod
    def load(cls, path: str, *, activation_checkpointing: bool = False, adapters: LoraConfig | None = None) -> Self:
        """Load from a `save_pretrained` folder in float32 (the master weights); with `adapters` only those train."""
        hf = cls._load_hf(path)
        if adapters is not None:
            add_adapters(hf, adapters)
        return cls(hf, activation_checkpointing=activation_checkpointing)

    @classmethod
    @abstractmethod
    def _load_hf(cls, path: str) -> nn.Module:
        """The model of transformers, with our attention."""

    @abstractmethod
    def num_chunks(self, num_targets: int) -> int:
        """How often the head would run for so many trained tokens, if `least_chunks` did not ask for more."""

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers: the units of sharding."""
        layers = self.hf.model.layers  # type: ignore[union-attr]
        assert isinstance(layers, nn.ModuleList)
        return layers

    def _hidden(self, tokens: Tensor, positions: Tensor, layout: Layout, sources: Tensor) -> Tensor:
        """Last hidden states at `sources`, [N, D]."""
        hidden: Tensor = self.hf.model(  # type: ignore[operator]
            input_ids=tokens[None], position_ids=positions[None], layout=layout, use_cache=False
        )[0][0]
        return hidden[sources]


class Policy(PackedNetwork):
    """Log-probs and entropies of the trained tokens of a micro-batch."""

    def __init__(self, hf: nn.Module, *, activation_checkpointing: bool = False) -> None:
        super().__init__(hf, activation_checkpointing=activation_checkpointing)
        if type(hf.lm_head) is nn.Linear:
            hf.lm_head.__class__ = Head

    @classmethod
    def _load_hf(cls, path: str) -> nn.Module:
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="rlsys_packed")
        config = hf.config.get_text_config()
        for name in _LOGIT_CHANGES:
            if getattr(config, name, None) not in (None, 1):
                raise ConfigError(
                    f"the model {path!r} changes its logits ({name}: {getattr(config, name)}), which the learner does "
                    "not do; its log-probs would be wrong, so use a model of another family"
                )
        assert isinstance(hf, nn.Module)
        return hf

    def num_chunks(self, num_targets: int) -> int:
        """By the size of the vocabulary and the kind of device; see `rlsys.learners.head`."""
        vocabulary = self.hf.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
        return num_chunks(num_targets, vocabulary, on_gpu=next(self.parameters()).device.type != "cpu")

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: Layout,
        targets: Tensor,
        sources: Tensor,
        temperature: float,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of `targets` [N] and entropies, both [N] float32; the second with a gradient only where asked.

        The head runs only where a token trains. Where it must run in several chunks, so that tokens x vocabulary never
        exists at once, the logits of each are thrown away and computed again in the backward pass.
        """
        hidden = self._hidden(tokens, positions, layout, sources)
        labels = tokens[targets]
        count = max(self.num_chunks(len(targets)), self.least_chunks)
        if count == 1:
            return self._head(hidden, labels, temperature, entropy_gradient)
        gradient = SummedGradient(count)
        # All chunks or none: where ranks agree how often they run the head, they must agree in the backward pass too.
        parts = [
            checkpoint(self._head, *chunk, temperature, entropy_gradient, gradient, use_reentrant=False)
            for chunk in zip(hidden.tensor_split(count), labels.tensor_split(count), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _head(
        self,
        hidden: Tensor,
        labels: Tensor,
        temperature: float,
        entropy_gradient: bool,
        gradient: SummedGradient | None = None,
    ) -> tuple[Tensor, Tensor]:
        head = self.hf.lm_head
        assert isinstance(head, nn.Module)
        with summed_gradient(head, gradient):
            logits = head(hidden)  # as a module: sharding hangs its hooks there
        return token_logprobs(logits, labels, temperature, entropy_gradient=entropy_gradient)


class Scorer(PackedNetwork):
    """One number for each trained token, read off the hidden state of the token before it: a critic, a reward model.

    The folder is that of a transformers `...ForSequenceClassification` with one label, which `rlsys.rewards` loads too,
    or of a causal language model, whose head is dropped: the new one is zero, so that every number begins as 0.
    """

    @classmethod
    def _load_hf(cls, path: str) -> nn.Module:
        """Load the classifier, complete it, and give it a pad token, which batches of others need.

        Raises:
            ConfigError: there is none, it has more than one label, or weights other than its head are missing.
        """
        try:
            with _quiet_loading():
                hf, report = AutoModelForSequenceClassification.from_pretrained(
                    path,
                    num_labels=1,
                    dtype=torch.float32,
                    attn_implementation="rlsys_packed",
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"no model for a scalar head in {path!r}: {first}") from error
        wrong = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])} - {"score.weight"})
        if wrong:
            raise ConfigError(f"the model {path!r} lacks the weights {', '.join(wrong[:3])}, or they have other shapes")
        if report["mismatched_keys"]:
            raise ConfigError(f"the model {path!r} has a head of more than one label; use one with num_labels=1")
        if report["missing_keys"]:
            nn.init.zeros_(hf.score.weight)
        config = hf.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = load_tokenizer(path).pad_token_id
        assert isinstance(hf, nn.Module)
        return hf

    def num_chunks(self, num_targets: int) -> int:  # noqa: ARG002
        """Once: one number for a token needs no chunks."""
        return 1

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: Layout,
        targets: Tensor,  # noqa: ARG002
        sources: Tensor,
        temperature: float = 1.0,  # noqa: ARG002
        entropy_gradient: bool = False,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Values at `sources` [N] float32, and zeros [N] where a policy has entropies."""
        hidden = self._hidden(tokens, positions, layout, sources)
        values = self.hf.score(hidden).float().squeeze(-1).clone()  # type: ignore[operator]
        return values, torch.zeros_like(values)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' warning that weights are missing: the caller reads the report."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def to_tensors(micro: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Layout, Tensor, Tensor]:
    """Tokens, positions, layout, targets and sources as a `PackedNetwork` takes them.

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
