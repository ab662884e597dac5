"""What a plug-in must look like. Any class of this shape works; nothing has to be inherited or registered.

Rewards and tools may also have `async start()`, awaited once in each actor before its first rollout, which raises where
the plug-in cannot work on this host, and `close()`, plain or async, called when their actor ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlsys.types import Completion, Problem, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """A score with how it came about: `status` is counted per batch, `terms` are logged one by one.

    A `status` of "timeout" or "error" says that the rollout could not be graded, whatever the score: what becomes of it
    is for the run's configuration to say (`on_failure`). `extracted` is the part of the response that was graded, for
    people to read.
    """

    score: float
    status: str = "ok"
    terms: Mapping[str, float] = field(default_factory=dict)
    extracted: str | None = None


class Reward(Protocol):
    """Grades one rollout. A plain function `(problem, response) -> float` is accepted in its place.

    `response` is the text that the policy itself wrote (no prompt, no tool output). What is not `async` is run in
    threads, several gradings at a time.
    """

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> float | RewardResult: ...


class GroupReward(Protocol):
    """Grades all siblings of one problem together: comparisons, ranks, diversity.

    The group has the siblings that lived and could be graded by the other rewards, with what they got from those.
    Returns one score for each sibling, in their order.
    """

    async def score_group(self, group: RolloutGroup) -> Sequence[float | RewardResult]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What the policy reads back. A failure is text as well: the policy may correct itself."""

    text: str
    ok: bool = True
    seconds: float = 0.0


class Session(Protocol):
    """One rollout's use of a tool.

    An exception from any of these, or from `Tool.open`, drops the rollout. Where the tool has actors of its own, a
    session may be lost with its actor. Its calls are then made again in a new one: their effects must stay inside it.
    """

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult: ...

    async def close(self) -> None: ...


class Tool(Protocol):
    """Something the policy may call. `parameters` is a JSON schema, as in OpenAI tool calling.

    A plain typed function with a docstring is accepted in its place (`rlsys.function_tool`).
    """

    name: str
    description: str
    parameters: Mapping[str, Any]

    async def open(self, rollout_id: str) -> Session: ...


class Engine(Protocol):
    """Writes tokens. Log-probs are of the distribution that was sampled from (temperature included)."""

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion: ...
