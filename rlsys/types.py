"""The values that travel: a `Problem` goes out, a `RolloutGroup` comes back, a `TrainBatch` goes down.

Every type is frozen, keyword-only and checked once, when it is made; after that nobody checks it again.
Per-token data are numpy arrays of one common length, because Ray moves arrays without copying them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Message = Mapping[str, Any]
"""One chat message in OpenAI's shape: `role`, `content` and, where a tool was called, `tool_calls`."""

NetworkKind = Literal["policy", "scorer"]
"""What a learner trains: a language model, or one with a number for each token in place of its head."""

GIVEN_UP = "given_up"
"""The reason of rollouts that were ended because their first siblings were all rewarded alike."""

NOT_FINITE = "not_finite"
"""The metric of a rollout that says how many of its tokens had a log-prob that is not finite, where any had: such a
log-prob stands as 0, and the rollout must not train. Also the reason for which it is dropped."""

FinishReason = Literal["stop", "length", "turns"]
"""Why a rollout ended: the policy ended it, the token budget did, or the turn budget did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A task with what is needed to grade it.

    `id` is unique in its data source; `answer` is whatever the reward compares with (None where a reward
    needs none); `metadata` is anything else the source knows.
    """

    id: str
    prompt: tuple[Message, ...]
    answer: str | None = None
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"problem {self.id!r} has an empty prompt; give it at least one message")
        for message in self.prompt:
            if "role" not in message or "content" not in message:
                raise ValueError(f"problem {self.id!r}: a message needs `role` and `content`, got {sorted(message)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What one engine call wrote: `tokens`, `logprobs` and the `versions` of the weights that wrote them, each [T].

    `text` is the decoded output where the engine had to look for a stop string, else empty; `finish_reason` is "stop"
    (end of turn), "stop_string" or "length".
    Never leaves the actor process.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    text: str
    finish_reason: Literal["stop", "stop_string", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt at a problem, with any number of turns, on one token axis of length T.

    `tokens` [T] int32 hold prompt, generated text and tool output in the order the policy saw them; `loss_mask` [T]
    bool is true where the policy wrote the token; `logprobs` [T] float32 are the engine's own (0 where
    not generated); `versions` [T] int32 say which weights wrote the token (-1 where not generated). `response` is
    the text that the policy wrote, `transcript` all of it with prompt and tool output, for people to read. Where the
    policy thinks in private, `response` is what it wrote behind that, and so many tokens as `num_hidden` says, the
    prompt and the thought, are not shown to rewards.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    response: str = ""
    transcript: str = ""
    reward: float = 0.0
    reward_terms: Mapping[str, float] = field(default_factory=dict)
    finish_reason: FinishReason = "stop"
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_hidden: int = 0

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in ("tokens", "loss_mask", "logprobs", "versions")}
        if len(set(shapes.values())) != 1 or len(self.tokens.shape) != 1:
            raise ValueError(f"a rollout's arrays share one token axis, got {shapes}")
        if not np.isfinite(self.logprobs).all():
            raise ValueError("a rollout's log-probs must be finite")
        if not np.isfinite(self.reward):
            raise ValueError(f"a rollout's reward must be finite, got {self.reward}; check the reward function")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_trained_tokens(self) -> int:
        """How many tokens the policy wrote."""
        return int(self.loss_mask.sum())

    @property
    def first_version(self) -> int:
        """The oldest weights that wrote a token of this rollout (-1 where none was written)."""
        written = self.versions[self.loss_mask]
        return int(written.min()) if written.size else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """The siblings of one problem: the unit of advantages, filters and staleness.

    `dropped` counts the rollouts that are missing by reason: "prompt_too_long", "not_selected", or with what was said
    behind it "reward_error: ...", "reward_timeout: ...", "tool_error: ...". Where `GIVEN_UP` is among the reasons, the
    others were ended before their time.
    """

    problem: Problem
    rollouts: tuple[Rollout, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def rewards(self) -> NDArray[np.float64]:
        """Rewards of the siblings, [G]."""
        return np.array([rollout.reward for rollout in self.rollouts], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One optimizer step's data: rollouts, and for each one advantage array [T] and the weight of its tokens' losses.

    `num_tokens` is the number of trained tokens in the *global* batch; every loss sum is divided by it, so that
    neither micro-batches nor the number of ranks change the gradient. `proximal_logprobs`, one array [T] for each
    rollout, are of the policy as it was before the first update on these rollouts. `unit` rollouts in a row belong to
    each other (2 for the chosen and the rejected one of a pair): they have one prompt and are never parted.
    """

    rollouts: tuple[Rollout, ...]
    advantages: tuple[NDArray[np.float32], ...]
    weights: tuple[float, ...]
    num_tokens: int
    proximal_logprobs: tuple[NDArray[np.float32], ...] | None = None
    unit: int = 1

    def __post_init__(self) -> None:
        if len(self.rollouts) % self.unit:
            raise ValueError(f"{len(self.rollouts)} rollouts are no whole number of units of {self.unit}")
        if self.proximal_logprobs is not None and len(self.proximal_logprobs) != len(self.rollouts):
            raise ValueError(f"{len(self.rollouts)} rollouts, but {len(self.proximal_logprobs)} proximal log-probs")
        if not len(self.rollouts) == len(self.advantages) == len(self.weights):
            raise ValueError(
                f"{len(self.rollouts)} rollouts, but {len(self.advantages)} advantage arrays and {len(self.weights)} "
                "weights"
            )
        for index, (rollout, advantage) in enumerate(zip(self.rollouts, self.advantages, strict=True)):
            if advantage.shape != rollout.tokens.shape:
                raise ValueError(f"rollout {index} has {len(rollout)} tokens but advantages of shape {advantage.shape}")
        if self.num_tokens <= 0:
            raise ValueError("a batch without a single trained token cannot be learned from")
