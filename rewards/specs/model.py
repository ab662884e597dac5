"""A grader that asks a language model for a number."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from rlsys.errors import ConfigError
from rlsys.interfaces import RewardResult
from rlsys.rewards.specs.services import Services
from rlsys.rewards.specs.spec import Spec, is_number
from rlsys.rewards.specs.values import AbsentError, GradingError, Values, strict_json
from rlsys.rewards.untrusted import behind_thinking, visible

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGE_CHARACTERS = 100_000
"""A response that makes a message longer gets the lowest grade; no engine is asked."""
MAX_REPLY_CHARACTERS = 20_000
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w%])", re.ASCII)
_OUT_OF = re.compile(r"(?:/|\bof)\s*$", re.IGNORECASE)


class ScoreModelGrader:
    """Shows `input`, messages that are templates, to an engine and takes the number that it answers.

    The answer is the number under `result` of a JSON object (other keys may hold its reasons) or, where there is no
    object, the last number. A number outside `range` is no answer; one inside is the score as it is. The engine is
    asked again up to `retries` times. The messages have no invisible characters.

    `engine` is `{use: "module:object", options: {...}}`; what it makes has `async generate(messages, sampling) -> str`.
    """

    def __init__(self, spec: Spec, services: Services, *, engine: Any, retries: int, engine_seconds: float) -> None:
        spec.check_keys(("input", "model"), ("range", "sampling_params", "pass_threshold", "engine"))
        self._place, self._services = spec.place, services
        self._retries, self._engine_seconds = retries, engine_seconds
        self._messages = _messages(spec)
        self._model = spec.text("model")
        self._sampling = dict(spec.mapping("sampling_params"))
        self._low, self._high = _range(spec)
        self._threshold = spec.threshold(self._low, self._high)
        self._use, self._options = _engine(spec, spec.fields.get("engine", engine))
        self.absent = self._graded(self._low)

    async def start(self) -> None:
        """Start the engine."""
        await self._engine()

    async def grade(self, values: Values) -> RewardResult:
        """Ask until there is an answer; GradingError where there is none."""
        messages = [{"role": role, "content": visible(_bounded(text.render(values)))} for role, text in self._messages]
        engine = await self._engine()
        for _ in range(self._retries + 1):
            try:
                async with asyncio.timeout(self._engine_seconds):
                    reply = await engine.generate(messages, self._sampling)
                return self._graded(score_of(reply, self._low, self._high))
            except TimeoutError:
                failure = GradingError(f"no answer within {self._engine_seconds:g} s", status="timeout")
            except GradingError as error:
                failure = error
            except ConfigError:
                raise
            except Exception as error:  # an engine that is reached by reference raises errors of its own
                failure = GradingError(f"the engine failed with {type(error).__name__}: {error}")
        raise failure

    async def _engine(self) -> Any:
        place = f"{self._place}.engine"
        return await self._services.engine(self._use, self._options, self._model, place=place)

    def _graded(self, score: float) -> RewardResult:
        if self._threshold is None:
            return RewardResult(score=score)
        return RewardResult(score=score, status="correct" if score >= self._threshold else "wrong")


def score_of(reply: Any, low: float, high: float) -> float:
    """The number that a judge answered; GradingError where there is none, several, or one out of range."""
    text = behind_thinking(reply) if isinstance(reply, str) else None
    if text is None or len(text) > MAX_REPLY_CHARACTERS:
        raise GradingError("the judge's answer is empty or much too long")
    numbers = _results(text) if "{" in text else _bare(text)
    if len(numbers) != 1:
        raise GradingError(f"the judge answered no single number: {text[:200]!r}")
    if not low <= (number := numbers.pop()) <= high:
        raise GradingError(f"the judge answered {number:g}, which is not within {low:g} and {high:g}")
    return number


def _results(text: str) -> set[float]:
    """All numbers under `result` of JSON objects that are the text, or stand in code fences of it."""
    found = set()
    for piece in _FENCE.findall(text) or [text]:
        try:
            value = strict_json(piece.strip())
        except ValueError:
            continue
        if isinstance(value, dict) and is_number(value.get("result")):
            found.add(float(value["result"]))
    return found


def _bare(text: str) -> set[float]:
    """The last number, unless it only says out of how many."""
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    if last is None or _OUT_OF.search(text[max(0, last.start() - 10) : last.start()]):
        return set()
    return {float(last[0])}


def _bounded(text: str) -> str:
    if len(text) > MAX_MESSAGE_CHARACTERS:
        raise AbsentError(f"a message of {len(text)} characters; the limit is {MAX_MESSAGE_CHARACTERS}")
    return text


def _messages(spec: Spec) -> list[tuple[str, Any]]:
    given = spec.fields["input"]
    if not isinstance(given, list | tuple) or not given:
        raise spec.wrong("input", "must be a list of messages, each with `role` and `content`")
    messages = []
    for index, fields in enumerate(given):
        message = Spec(fields=fields, place=f"{spec.place}.input.{index}")
        if set(message.fields) - {"type"} != {"role", "content"} or message.fields.get("type", "message") != "message":
            raise ConfigError(f"{message.place}: a message has `role` and `content`, got {sorted(message.fields)}")
        messages.append((message.choice("role", ROLES), message.template("content")))
    return messages


def _range(spec: Spec) -> tuple[float, float]:
    match spec.fields.get("range", (0, 1)):
        case [low, high] if is_number(low) and is_number(high) and low < high:
            return float(low), float(high)
    raise spec.wrong("range", f"must be two numbers, the lower one first, got {spec.fields['range']!r}")


def _engine(spec: Spec, engine: Any) -> tuple[str, Mapping[str, Any]]:
    if engine is None:
        raise spec.wrong(
            "engine",
            "must be given here or as GraderReward's option `engine`, as `{use: module:object, options: {...}}`: what "
            "answers in place of the model; such as `use: rlsys.rewards.chat_engine:ChatEngine`",
        )
    inner = Spec(fields=engine, place=f"{spec.place}.engine")
    if unknown := set(inner.fields) - {"use", "options"}:
        raise ConfigError(f"{inner.place}: unknown key {min(map(str, unknown))!r}; known: use, options")
    if "use" not in inner.fields or ":" not in inner.text("use"):
        raise inner.wrong("use", "must be a reference, `module:object`")
    return inner.text("use"), inner.mapping("options")
