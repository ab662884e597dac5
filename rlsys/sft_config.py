"""The configuration of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlsys.plug_in_config import PlugIn, require
from rlsys.stage_config import OptimizerConfig, require_a_length


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on demonstrations."""

    demonstrations: PlugIn | None = None
    """Function of (training problems, ...) that returns a list of `Demonstration`."""
    steps: int | None = None
    """Optimizer steps; 100 where `epochs` is not given either."""
    epochs: float | None = None
    """Instead of `steps`: how often all demonstrations are learned from."""
    demonstrations_per_step: int = 64
    """Demonstrations in one optimizer step."""
    max_tokens: int | None = None
    """The longest sequence, prompt and answer together; without it, `actors.max_model_tokens`."""
    too_long: Literal["error", "drop", "cut"] = "error"
    """A demonstration of more tokens is an error, is dropped and counted, or is cut and counted."""
    held_out: PlugIn | None = None
    """Source of demonstrations on which the loss is only measured; what has the same prompt is not learned from."""
    held_out_share: float = 0.0
    """Instead of `held_out`: so much of the demonstrations, by their prompts, is measured on and not learned from."""
    held_out_every: int = 0
    """Steps between measurements of the held-out loss; 0 measures only behind the last step."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Optimizer of this stage."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_a_length("sft", self.steps, self.epochs)
        for name in ("demonstrations_per_step", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"sft.{name} is {getattr(self, name)}; at least 1 is needed")
        require(
            self.max_tokens is None or self.max_tokens >= 2,
            f"sft.max_tokens is {self.max_tokens}; at least 2, or null for actors.max_model_tokens",
        )
        require(
            0 <= self.held_out_share < 1,
            f"sft.held_out_share is {self.held_out_share:g}; a share of the demonstrations lies between 0 and 1",
        )
        require(
            self.held_out is None or self.held_out_share == 0,
            "sft.held_out and sft.held_out_share both say what to measure on; leave one out",
        )
        require(self.held_out_every >= 0, f"sft.held_out_every is {self.held_out_every}; 0 measures only at the end")
        require(
            self.held_out_every == 0 or self.held_out is not None or self.held_out_share > 0,
            f"sft.held_out_every is {self.held_out_every}, but nothing is held out; set sft.held_out_share or "
            "sft.held_out",
        )
