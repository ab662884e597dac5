"""Hidden thoughts: the policy writes a thought, then a response, and only the response is ever shown to a reward.

As in Thought Preference Optimization (arXiv 2410.10630). The thought prompt is put around the last message of the
user, so problems stay what they are; marks tell the two parts apart. Prompts and marks are worded by ourselves.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlsys.errors import DataError
from rlsys.plug_in_config import require
from rlsys.plugins import resolve

if TYPE_CHECKING:
    from rlsys.types import Problem, Rollout, RolloutGroup

FAILURE = "thought_parse_failure"
"""Metric of a rollout that was asked for a thought: 1 where its text is not a thought and a response, else 0."""

MEASURED = (FAILURE, "thought_tokens", "shown_tokens")
"""The metrics of such a rollout: tokens of the thought, mark included, and tokens of the response, which are shown."""

_BOTH = """\
Answer the message at the end in two parts. First write "{thought_mark}" and behind it %s. This part is private: \
nobody is going to read it. Then write "{response_mark}" and behind it the %s, which must be complete without the \
thoughts. Write each of the two marks exactly once.

The message:
{message}"""

generic = _BOTH % ("your thoughts: a plan, attempts, doubts, whatever helps", "answer itself")
"""Asks for thoughts of any kind."""

specific = _BOTH % (
    "what the message asks for, then a draft of the answer, then an evaluation of that draft that says what to change",
    "final answer",
)
"""Asks for a draft and its evaluation."""

_REFERENCE = re.compile(r"[\w.]+:\w+")
_ARRAYS = ("tokens", "loss_mask", "logprobs", "versions")
_SHOWN_METRICS = ("correct", "tool_calls", "tool_errors")


@dataclass(frozen=True, kw_only=True)
class ThoughtConfig:
    """Hidden thoughts in front of the response."""

    prompt: str = "rlsys.thoughts:generic"
    """What asks for them: a text, or the `module:object` of one (`rlsys.thoughts:generic`, `rlsys.thoughts:specific`).
    `{message}` stands for the last message of the user (without it, the text goes behind that message),
    `{thought_mark}` and `{response_mark}` for the marks."""
    thought_mark: str | None = "My thoughts:"
    """What the policy must begin with; null: the thought begins at once."""
    response_mark: str = "My response:"
    """What stands between thought and response, exactly once."""
    failure_reward: float = 0.0
    """Reward of what has not this form; the lowest of its siblings' rewards where that is less. Never correct."""

    def __post_init__(self) -> None:
        place = "chat.thought"
        require(bool(self.response_mark.strip()), f"{place}.response_mark is empty; give a text that ends the thought")
        if self.thought_mark is not None:
            require(bool(self.thought_mark.strip()), f"{place}.thought_mark is empty; give a text, or null for none")
            require(
                self.thought_mark not in self.response_mark and self.response_mark not in self.thought_mark,
                f"{place}: one of the marks {self.thought_mark!r} and {self.response_mark!r} contains the other; "
                "they could not be told apart",
            )

    @property
    def marks(self) -> list[str]:
        """Those that must be written."""
        return [mark for mark in (self.thought_mark, self.response_mark) if mark is not None]


class Thoughts:
    """How the policy is asked for thoughts, and how they are told from the response.

    Raises:
        ConfigError: the prompt's reference does not exist, is no text, or does not tell the policy the marks.
    """

    def __init__(self, config: ThoughtConfig) -> None:
        self.config = config
        text: Any = config.prompt
        if _REFERENCE.fullmatch(text):
            text = resolve(text, place="chat.thought.prompt")
            require(isinstance(text, str), f"chat.thought.prompt: {config.prompt!r} is {text!r:.80}; name a text")
        for name in ("thought_mark", "response_mark"):
            mark = getattr(config, name)
            text = text if mark is None else text.replace(f"{{{name}}}", mark)
        for mark in config.marks:
            require(
                mark in text,
                f"chat.thought.prompt does not tell the policy to write {mark!r}; "
                "put {thought_mark} and {response_mark} into it",
            )
        self.prompt: str = text if "{message}" in text else "{message}\n" + text
        """The prompt with the marks filled in; `{message}` is not."""

    def instruct(self, problem: Problem) -> list[dict[str, Any]]:
        """The messages of a problem, the last one of the user with the thought prompt around it.

        Raises:
            DataError: no message of the user is a text.
        """
        messages = [dict(message) for message in problem.prompt]
        for message in reversed(messages):
            if message["role"] == "user" and isinstance(message["content"], str):
                message["content"] = self.prompt.replace("{message}", message["content"])
                return messages
        raise DataError(
            f"problem {problem.id!r} has no message of the user with a text, which the thought prompt could go to; "
            "give it one, or set chat.thought=null"
        )

    def split(self, text: str) -> tuple[str, str] | None:
        """(thought, response), or None where the text is not of the form: each mark once, the thought first, and a
        response behind it that is not empty."""
        thought, mark, response = text.partition(self.config.response_mark)
        opening = self.config.thought_mark
        if not mark or not response.strip() or self.config.response_mark in response:
            return None
        if opening is not None:
            before, mark, thought = thought.partition(opening)
            if not mark or before.strip() or text.count(opening) != 1:
                return None
        return thought.strip(), response.strip()

    def hide(self, rollout: Rollout, decode: Callable[[Sequence[int]], str]) -> Rollout:
        """The rollout with the response part as its `response`, and `num_hidden` up to it.

        Where the text has not the form, all is hidden: response "", metric `thought_parse_failure` 1, not correct,
        the reward that of failures. `decode` makes the text of own tokens.
        """
        own = rollout.loss_mask.nonzero()[0]
        parts = self.split(rollout.response)
        if parts is None:
            counted = dict(zip(MEASURED, (1.0, float(len(own)), 0.0), strict=True))
            return replace(
                rollout,
                response="",
                num_hidden=len(rollout),
                reward=self.config.failure_reward,
                metrics={**rollout.metrics, **counted, "correct": 0.0},
            )
        tokens, mark = rollout.tokens[own].tolist(), self.config.response_mark
        # The first token that lies wholly behind the mark: the one before it may hold the end of the mark.
        first = bisect_left(range(len(tokens)), True, key=lambda count: mark in decode(tokens[:count]))
        counted = dict(zip(MEASURED, (0.0, float(first), float(len(own) - first)), strict=True))
        return replace(
            rollout,
            response=parts[1],
            num_hidden=int(own[first]) if first < len(own) else len(rollout),
            metrics={**rollout.metrics, **counted},
        )


def is_failure(rollout: Rollout) -> bool:
    """Whether a thought was asked for and the text is not of that form."""
    return bool(rollout.metrics.get(FAILURE))


def shown(rollout: Rollout) -> Rollout:
    """What a reward may see of a rollout: without a hidden part, all of it.

    Else its arrays are those of the tokens that the policy wrote in its response, its transcript is the response, and
    its metrics are what other rewards said and how often tools were called: nothing from which the thought could be
    read. Nothing in it refers to the whole rollout.
    """
    if not rollout.num_hidden:
        return rollout
    kept = rollout.loss_mask.copy()
    kept[: rollout.num_hidden] = False
    return replace(
        rollout,
        **{name: getattr(rollout, name)[kept] for name in _ARRAYS},
        transcript=rollout.response,
        num_hidden=0,
        metrics={name: value for name, value in rollout.metrics.items() if _may_be_shown(name)},
    )


def _may_be_shown(metric: str) -> bool:
    return metric in _SHOWN_METRICS or metric.startswith("status/")


def shown_group(group: RolloutGroup) -> RolloutGroup:
    """The same for a group; of what was dropped only the kinds are shown, as a tool may have repeated its code."""
    if not any(rollout.num_hidden for rollout in group.rollouts):
        return group
    kinds: dict[str, int] = {}
    for reason, count in group.dropped.items():
        kind = reason.partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + count
    return replace(group, rollouts=tuple(map(shown, group.rollouts)), dropped=kinds)


def mean_of(rollouts: Sequence[Rollout]) -> Mapping[str, float]:
    """Means of the metrics in `MEASURED` over the rollouts that have them; nothing where none has."""
    found = [rollout.metrics for rollout in rollouts if FAILURE in rollout.metrics]
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in MEASURED if found}
