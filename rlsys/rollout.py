"""The agent loop: one rollout is one coroutine that generates, calls tools and goes on, until it is done and graded."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from rlsys.chat import Chat, ToolCall
from rlsys.config import SamplingConfig
from rlsys.demonstrations import Segments
from rlsys.errors import ToolError, failures_of_tool
from rlsys.interfaces import Engine, Session, ToolResult
from rlsys.reward_terms import RewardTerm, grade_rollout
from rlsys.thinking_words import thinking_ratios
from rlsys.thoughts import mean_of as mean_of_thoughts
from rlsys.types import NOT_FINITE, Completion, FinishReason, Problem, Rollout

log = logging.getLogger(__name__)

_MIN_ROOM = 1
"""A prompt must leave at least so many tokens of context."""


@dataclass(slots=True)
class _Track:
    """The growing token axis of one rollout."""

    tokens: list[int]
    mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    own_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pad()

    def _pad(self) -> None:
        length = len(self.tokens)
        self.mask += [False] * (length - len(self.mask))
        self.logprobs += [0.0] * (length - len(self.logprobs))
        self.versions += [-1] * (length - len(self.versions))

    def append_prefix(self, tokens: Sequence[int], *, trained: bool) -> None:
        """The beginning of the turn, written by no engine of this run: the policy's own words where `trained`."""
        self.tokens += tokens
        if trained:
            self.own_tokens += tokens
            self.mask += [True] * len(tokens)
        self._pad()

    def append_read(self, tokens: Sequence[int]) -> None:
        """Tokens that the policy reads: not trained."""
        self.tokens += tokens
        self._pad()

    def append_written(self, completion: Completion) -> None:
        """Tokens that the policy wrote: trained, exactly as they were generated."""
        written = completion.tokens.tolist()
        self.tokens += written
        self.own_tokens += written
        self.mask += [True] * len(written)
        self.logprobs += completion.logprobs.tolist()
        self.versions += completion.versions.tolist()


async def run_rollout(
    problem: Problem,
    *,
    engine: Engine,
    chat: Chat,
    rewards: Sequence[RewardTerm],
    sampling: SamplingConfig,
    max_model_tokens: int,
    rollout_id: str,
    policy_step: int = 0,
    prefix: Segments = (),
) -> Rollout | None:
    """One graded attempt at the problem; None where the prompt, with `prefix`, leaves no room.

    `prefix` is a beginning of the turn, behind which the policy goes on: its trained segments count as the policy's
    words, for the reward as well, with log-prob 0 and version -1 (so not for RL); all of it counts in the budget.
    Calls in it are made again, so that the session has what they left; they must say what stands behind them (a session
    is seeded by `rollout_id`: keep the id where a prefix comes from a rollout). A fence left open is closed by the
    policy, and what it wrote there is called.

    Terms that grade groups are left to `grade_group`. The weights of terms are those of `policy_step`.

    Raises:
        RewardError: the rollout cannot be graded, and is to be dropped for it.
        TrainingStalledError: the rollout cannot be graded, and the run is to end for it.
        ToolError: a tool raised, or could not be brought back as the policy knew it.
    """
    prompt = chat.render(problem)
    budget = min(sampling.max_response_tokens, max_model_tokens - len(prompt))
    begun = [(text, chat.encode(text), trained) for text, trained in prefix]
    if budget < _MIN_ROOM + sum(len(tokens) for _, tokens, _ in begun):
        return None
    limit = len(prompt) + budget
    track = _Track(list(prompt))
    counts = {"tool_calls": 0.0, "tool_errors": 0.0, "tool_seconds": 0.0}
    started = time.perf_counter()
    async with _Sessions(chat, rollout_id, counts) as sessions:
        turn = await _begin(track, begun, chat, sessions)
        finish = await _converse(track, limit, engine, chat, sampling, sessions, turn)
    counts["rollout_seconds"] = time.perf_counter() - started
    logprobs = np.array(track.logprobs, dtype=np.float32)
    if not np.isfinite(logprobs).all():
        counts[NOT_FINITE] = float((~np.isfinite(logprobs)).sum())
    rollout = Rollout(
        tokens=np.array(track.tokens, dtype=np.int32),
        loss_mask=np.array(track.mask, dtype=np.bool_),
        logprobs=np.where(np.isfinite(logprobs), logprobs, np.float32(0)),
        versions=np.array(track.versions, dtype=np.int32),
        response=chat.decode(track.own_tokens),
        transcript=chat.tokenizer.decode(track.tokens),
        finish_reason=finish,
        metrics=counts,
    )
    return await grade_rollout(problem, chat.hide_thought(rollout), rewards, step=policy_step)


async def _begin(
    track: _Track, begun: Sequence[tuple[str, Sequence[int], bool]], chat: Chat, sessions: _Sessions
) -> str:
    """Put a prefix (text, tokens, trained) on the axis, make its calls again, return the text of the turn left open."""
    turn = ""
    for text, tokens, trained in begun:
        calls = [] if trained else chat.parse_calls(turn, turn_ended=False) or chat.parse_calls(turn, turn_ended=True)
        if calls and chat.render_results(await sessions.answer(calls)) != tokens:
            raise ToolError(
                f"tool {calls[0].name!r} did not answer again what stands in the prefix of the rollout: {text[:200]!r}"
            )
        track.append_prefix(tokens, trained=trained)
        turn = turn + text if trained else ""
    return turn


async def _converse(
    track: _Track,
    limit: int,
    engine: Engine,
    chat: Chat,
    sampling: SamplingConfig,
    sessions: _Sessions,
    turn: str,
) -> FinishReason:
    """Generate and call tools until the policy ends its turn without a call, or a budget is spent.

    `turn` is what the policy has written in it already.
    """
    while True:
        if len(track.tokens) >= limit:
            return "length"
        options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": limit - len(track.tokens),
            "stop": chat.stop_strings,
        }
        completion = await engine.generate(track.tokens, sampling=options)
        track.append_written(completion)
        turn += completion.text or (chat.decode(completion.tokens.tolist()) if chat.tools else "")
        if completion.finish_reason == "length":
            return "length"
        ended = completion.finish_reason == "stop"
        calls = chat.parse_calls(turn, turn_ended=ended)
        if not calls and ended:
            return "stop"
        if calls:
            if sessions.counts["tool_calls"] + len(calls) > sampling.max_tool_calls:
                return "turns"
            results = await sessions.answer(calls)
            # The budget holds for tool output too; what does not fit is not read.
            read = chat.render_results(results)[: max(0, limit - len(track.tokens))]
            track.append_read(read)
            turn = ""
        if len(track.tokens) >= limit:
            return "length"


class _Sessions:
    """The tool sessions of one rollout, opened when first called and closed with it; `counts` is kept up to date."""

    def __init__(self, chat: Chat, rollout_id: str, counts: dict[str, float]) -> None:
        self._chat = chat
        self._rollout_id = rollout_id
        self.counts = counts
        self._open: dict[str, Session] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> _Sessions:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            await self._stack.aclose()
        except ToolError as failure:
            if error is None:
                raise
            log.warning("%s; told here only, because the rollout had ended before with %r", failure, error)

    async def answer(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Answer calls, one after the other."""
        results = [await self._call(call) for call in calls]
        self.counts["tool_calls"] += len(results)
        self.counts["tool_errors"] += sum(not result.ok for result in results)
        self.counts["tool_seconds"] += sum(result.seconds for result in results)
        return results

    async def _call(self, call: ToolCall) -> ToolResult:
        """Answer a call. What the policy did wrong is a text for it; ToolError where the tool raises."""
        if call.error is not None:
            return ToolResult(text=call.error, ok=False)
        started = time.perf_counter()
        with failures_of_tool(call.name):
            if call.name not in self._open:
                self._open[call.name] = await self._chat.tools[call.name].open(self._rollout_id)
                self._stack.push_async_callback(self._close, call.name)
            result = await self._open[call.name].call(call.arguments)
            return replace(result, seconds=time.perf_counter() - started)

    async def _close(self, name: str) -> None:
        with failures_of_tool(name):
            await self._open[name].close()


def mean_metrics(rollouts: Sequence[Rollout]) -> Mapping[str, float]:
    """What a batch of rollouts says: reward, accuracy, lengths, tools, how they ended, each grading status, words."""
    if not rollouts:
        return {}
    count = len(rollouts)

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if len(values) else float("nan")

    correct = [rollout.metrics.get("correct", 0.0) for rollout in rollouts]
    lengths = [float(rollout.num_trained_tokens) for rollout in rollouts]
    result = {
        "reward": mean([rollout.reward for rollout in rollouts]),
        "accuracy": mean(correct),
        "response_tokens": mean(lengths),
        "completed_ratio": mean([rollout.finish_reason == "stop" for rollout in rollouts]),
        "tool_rate": mean([rollout.metrics.get("tool_calls", 0.0) > 0 for rollout in rollouts]),
        "tool_calls": mean([rollout.metrics.get("tool_calls", 0.0) for rollout in rollouts]),
        "tool_error_rate": sum(rollout.metrics.get("tool_errors", 0.0) for rollout in rollouts)
        / max(1.0, sum(rollout.metrics.get("tool_calls", 0.0) for rollout in rollouts)),
    }
    for name in ("rollout_seconds", "tool_seconds", "reward_seconds"):
        if any(name in rollout.metrics for rollout in rollouts):
            result[name] = mean([rollout.metrics.get(name, 0.0) for rollout in rollouts])
    for name in sorted({name for rollout in rollouts for name in rollout.reward_terms}):
        result[f"reward/{name}"] = mean([rollout.reward_terms.get(name, 0.0) for rollout in rollouts])
    for name in sorted({name for rollout in rollouts for name in rollout.metrics if name.startswith("status/")}):
        result[name] = sum(rollout.metrics.get(name, 0.0) for rollout in rollouts) / count
    return {**result, **thinking_ratios([rollout.response for rollout in rollouts]), **mean_of_thoughts(rollouts)}
