"""A teacher that answers in place of the policy: any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from rlsys.completions import Completions, Reply, TeacherError
from rlsys.config import Config
from rlsys.conversation import to_rollout
from rlsys.demonstrations import Demonstration
from rlsys.plug_in_config import require
from rlsys.run_chat import run_chat
from rlsys.run_rewards import RunRewards
from rlsys.samplers import Answers, SamplerContext
from rlsys.samples import Sample
from rlsys.types import FinishReason, Problem, Rollout

_FINISHES: Mapping[str, FinishReason] = {"length": "length", "max_tokens": "length"}
"""How a teacher says that it did not come to an end; all else is taken for an end."""


class OpenAiTeacher:
    """Samples from a chat-completions endpoint, graded by the run's rewards; no engine of the run is started.

    `base_url` is what stands before `/chat/completions`, such as `https://host/v1`; `model` is its name there.
    `api_key_variable` names the environment variable of the driver that holds the key (without it, no key is sent);
    the key itself never stands in a configuration. Temperature, `top_p` and the most tokens are those of the stage's
    `sampling`; `length_field` is what the endpoint calls the last, and `body` is merged over every request (a field
    that is null there is left out).

    At most `concurrency` requests are open at a time, each asking for `choices_per_request` answers. One that fails for
    reasons that may pass (no connection, no whole answer within `timeout_seconds`, 408, 409, 425, 429, 5xx) is made
    again up to `max_attempts` times in all: after what the server says in `Retry-After`, else after `retry_seconds`,
    then after twice as long each time, at most `max_pause_seconds`. After that, and at once where the answer is no
    completion with a text, the answers are dropped, counted by reason, and too many of them end the stage
    (`max_failed`). It also ends when nothing at all was answered for `give_up_seconds`.

    `thinking` puts the field `reasoning_content` (or `reasoning`) as `<think>...</think>` in front of the answer, or
    leaves it out (`drop`). Where the run hides thoughts (`chat.thought`) the teacher is asked for them as the policy
    is, and its text is told apart as the policy's: rewards see the response alone. That field is left out then: the
    text has a thought of its own.
    """

    uses_rollout_actors = False

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_variable: str | None = None,
        concurrency: int = 32,
        choices_per_request: int = 1,
        timeout_seconds: float = 600.0,
        max_attempts: int = 6,
        retry_seconds: float = 1.0,
        max_pause_seconds: float = 60.0,
        give_up_seconds: float = 900.0,
        length_field: str = "max_tokens",
        thinking: Literal["keep", "drop"] = "keep",
        body: Mapping[str, Any] | None = None,
    ) -> None:
        require(choices_per_request >= 1, f"teacher: choices_per_request is {choices_per_request}; at least 1")
        require(thinking in ("keep", "drop"), f"teacher: thinking is {thinking!r}; known: keep, drop")
        self._model, self._body, self._length_field = model, dict(body or {}), length_field
        self._choices, self._thinking = choices_per_request, thinking
        self._server = Completions(
            base_url=base_url,
            model=model,
            api_key_variable=api_key_variable,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
            max_attempts=max_attempts,
            retry_seconds=retry_seconds,
            max_pause_seconds=max_pause_seconds,
            give_up_seconds=give_up_seconds,
        )
        parts = urlsplit(base_url)
        self.capacity = concurrency * choices_per_request
        self._place = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._rewards: RunRewards | None = None

    def check_config(self, _config: Config, *, place: str) -> None:  # noqa: ARG002
        """Raise ConfigError where there is no key."""
        self._server.headers()

    async def start(self, context: SamplerContext) -> None:
        """See whether the teacher is there, and start the rewards.

        Raises:
            ConfigError: there is no key, or it is refused.
            ResourceError: nothing answers there.
        """
        await self._server.start(tell=context.tell)
        self._sampling = context.sampling
        self._chat = await run_chat(context.config, str(context.model))
        if self._chat.thoughts is not None:
            self._thinking = "drop"
        self._provenance = {
            **context.provenance,
            "sampler": "teacher",
            "model": self._model,
            "base_url": self._place,
            "thinking": self._thinking,
            "body": self._body,
        }
        self._rewards = RunRewards(context.config)
        await self._rewards.start()

    async def sample(self, problem: Problem, *, size: int) -> Answers:
        """Ask for `size` answers and grade those that come."""
        assert self._rewards is not None
        replies, dropped = await self._replies(problem, size)
        rollouts = [self._rollout(problem, reply) for reply in replies]
        group = await self._rewards.grade(problem, rollouts)
        samples = [self._sample(problem, rollout) for rollout in group.rollouts]
        return Answers(samples=samples, dropped={**dropped, **group.dropped})

    async def _replies(self, problem: Problem, size: int) -> tuple[list[Reply], Counter[str]]:
        """What was answered, and by reason what was not. An endpoint may give fewer choices than it was asked for."""
        found: list[Reply] = []
        dropped: Counter[str] = Counter()
        while (missing := size - len(found) - dropped.total()) > 0:
            asked = [min(self._choices, missing - first) for first in range(0, missing, self._choices)]
            results = await asyncio.gather(*(self._ask(problem, count) for count in asked))
            for count, (replies, failures) in zip(asked, results, strict=True):
                for reply in replies[:count]:
                    if any(mark in reply.text + reply.reasoning for mark in self._chat.tokenizer.all_special_tokens):
                        dropped["teacher_error: a control token of the policy's chat stands in the text"] += 1
                    else:
                        found.append(reply)
                dropped.update(failures)
        return found, dropped

    async def _ask(self, problem: Problem, count: int) -> tuple[list[Reply], Counter[str]]:
        request: dict[str, Any] = {
            "model": self._model,
            "messages": self._chat.messages(problem),
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            self._length_field: self._sampling.max_response_tokens,
            **({"n": count} if count > 1 else {}),
            **self._body,
        }
        try:
            return await self._server.ask({key: value for key, value in request.items() if value is not None})
        except TeacherError as error:
            return [], Counter({f"teacher_error: {error}": count})

    def _rollout(self, problem: Problem, reply: Reply) -> Rollout:
        text = reply.text
        if reply.reasoning and self._thinking == "keep":
            text = f"<think>\n{reply.reasoning.strip()}\n</think>\n\n{text}"
        finish = _FINISHES.get(reply.finish_reason, "stop")
        turn = to_rollout(_demonstration(problem, text, finish), self._chat)
        rollout = Rollout(
            tokens=turn.tokens,
            loss_mask=turn.loss_mask,
            logprobs=turn.logprobs,
            versions=turn.versions,
            response=text,
            transcript=str(self._chat.tokenizer.decode(turn.tokens.tolist())),
            finish_reason=finish,
        )
        return self._chat.hide_thought(rollout)

    def _sample(self, problem: Problem, rollout: Rollout) -> Sample:
        correct, text = rollout.metrics.get("correct"), rollout.response
        if rollout.num_hidden:  # what trains is the thought and the response
            text = self._chat.decode(rollout.tokens[rollout.loss_mask].tolist())
        return Sample(
            demonstration=_demonstration(problem, text, rollout.finish_reason),
            num_tokens=rollout.num_trained_tokens,
            correct=None if correct is None else bool(correct),
            reward=rollout.reward,
            finish_reason=rollout.finish_reason,
            metrics=rollout.metrics,
            provenance=self._provenance,
        )

    async def close(self) -> None:
        """Close the connections and end the rewards."""
        await self._server.close()
        if self._rewards is not None:
            await self._rewards.close()


def _demonstration(problem: Problem, text: str, finish: FinishReason) -> Demonstration:
    return Demonstration(problem=problem, segments=((text, True),), complete=finish == "stop")
