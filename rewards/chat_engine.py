"""A language model that graders ask: messages in, text or the probability of a verdict out."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.chat import load_tokenizer
from rlsys.config import ActorsConfig
from rlsys.errors import ActorError, ConfigError
from rlsys.grader_text import PlainEncoder
from rlsys.plugins import resolve, run_hook
from rlsys.rewards.untrusted import behind_thinking, is_thinking
from rlsys.types import Completion, Message

log = logging.getLogger(__name__)

VERDICT = "\nVerdict:"
"""The judge is asked behind this text, which also ends its reasons."""

DEFAULT_MODEL_TOKENS = 8192
DEFAULT_ANSWER_TOKENS = 1024
_SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completions_tokens",
    "max_completion_tokens",
    "stop",
    "seed",
)
_CLOSE_THINKING = "\n</think>\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said: `probability` in [0, 1] of the first word against the second, read from the engine's own
    distribution and never from text; `reasons` as it wrote them. `reached` where it came to its verdict by itself and
    `cut` where the token budget ended its reasons; neither where it ended its turn without a verdict."""

    probability: float
    reasons: str
    num_reason_tokens: int
    reached: bool
    cut: bool


class ChatEngine:
    """One engine with the tokenizer and chat template of its model.

    `engine` is a `module:object` reference to a class that takes `model_path`, `config` and `seed` and has
    `async generate(prompt, *, sampling) -> Completion`, which must honour `allowed_token_ids`. Every further option is
    one of `ActorsConfig` (`max_model_tokens`, by default 8192 here, `dtype`, `gpus`, `engine_options`, ...).

    The content of a message is always plain text: what spells a control token in it does not become one. A request
    that the engine fails is made again up to `retries` times, nothing else is. Raises ConfigError for an unknown
    option, and at `start` for a model folder without tokenizer or chat template.
    """

    def __init__(
        self,
        *,
        path: str,
        engine: str = "rlsys.actors.engine:VllmEngine",
        seed: int = 0,
        retries: int = 2,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if retries < 0:
            raise ConfigError(f"retries of a judge's engine is {retries}; 0 asks once")
        self.config = _engine_config(options)
        self._path = path
        self._reference = engine
        self._seed = seed
        self._retries = retries
        self._template_options = dict(template_options or {})
        self._engine: Any = None

    async def start(self) -> None:
        """Load the tokenizer and start the engine; a second call does nothing."""
        if self._engine is not None:
            return
        self._tokenizer = load_tokenizer(self._path)
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"the tokenizer of the judge {self._path!r} has no chat template; add one to tokenizer_config.json"
            )
        self._plain = PlainEncoder(self._tokenizer)
        self._opens_thinking = is_thinking(self._parts([{"role": "user", "content": ""}])[-1])
        engine = resolve(self._reference, place="engine")
        self._engine = engine(model_path=self._path, config=self.config, seed=self._seed)
        try:
            await run_hook(self._engine, "start")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the engine's processes."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await run_hook(engine, "close")

    def count(self, text: str) -> int:
        """How many tokens the text has inside a message."""
        return len(self._plain.encode(text))

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages in the model's chat template, up to where it answers.

        The template writes marks in place of the contents, and what stands around them is tokenized with its control
        tokens, the contents without.
        """
        tokens: list[int] = []
        for position, part in enumerate(self._parts(messages)):
            tokens += self._plain.encode(content_text(messages[int(part)])) if position % 2 else self._encode(part)
        return tokens

    def _parts(self, messages: Sequence[Message]) -> list[str]:
        """The rendered template, and at every odd position the index of the message whose content stands there."""
        code = secrets.token_hex(8)
        marked = [{**message, "content": f"MARK{code}X{index}X"} for index, message in enumerate(messages)]
        text = self._tokenizer.apply_chat_template(
            marked, tokenize=False, add_generation_prompt=True, **self._template_options
        )
        parts = re.split(rf"MARK{code}X(\d+)X", text)
        if {int(index) for index in parts[1::2]} != set(range(len(messages))):
            raise ConfigError(f"the chat template of {self._path!r} leaves out messages; a judge needs all of them")
        return parts

    async def generate(self, messages: Sequence[Message], sampling: Mapping[str, Any]) -> str:
        """The model's answer as text, without its thinking ("" where it does not end).

        `sampling` may have `temperature` (0), `top_p`, `max_tokens` (1024; or OpenAI's `max_completion_tokens`,
        `max_completions_tokens`), `stop` and `seed`. Raises ConfigError for other keys, ValueError where the messages
        leave no room for the answer and ActorError where the engine fails again and again.
        """
        self._check_started()
        for name in sampling:
            if name not in _SAMPLING_KEYS:
                raise ConfigError(f"unknown sampling option {name!r} for a judge; known: {', '.join(_SAMPLING_KEYS)}")
        budgets = [sampling[name] for name in _SAMPLING_KEYS if "tokens" in name and sampling.get(name) is not None]
        budget = int(budgets[0]) if budgets else DEFAULT_ANSWER_TOKENS
        stop = sampling.get("stop") or ()
        request = {
            **{name: sampling[name] for name in ("temperature", "top_p", "seed") if sampling.get(name) is not None},
            "max_tokens": budget,
            "stop": [stop] if isinstance(stop, str) else list(stop),
        }
        prompt = self.render(messages)
        self._check_room(prompt, budget)
        completion = await self._ask(prompt, request)
        text = str(self._tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True))
        ends = [place for mark in request["stop"] if (place := text.find(mark)) >= 0]
        return behind_thinking(text[: min(ends, default=len(text))], thinks=self._opens_thinking) or ""

    async def verdict(
        self,
        messages: Sequence[Message],
        *,
        words: tuple[str, str],
        max_reason_tokens: int,
        temperature: float = 0.0,
    ) -> Verdict:
        """The model's reasons for up to `max_reason_tokens`, then the probability of the first word.

        Asked at a fixed place, whatever the reasons say and however they ended. Raises as `generate` does, and
        ConfigError for words that are not two different tokens.
        """
        self._check_started()
        yes, no = self.word_ids(words)
        prompt = self.render(messages)
        asked, closing = self._encode(VERDICT), self._encode(_CLOSE_THINKING)
        self._check_room(prompt, max_reason_tokens + len(closing) + len(asked) + 1)
        reasons: list[int] = []
        reached, cut = max_reason_tokens == 0, False
        if max_reason_tokens > 0:
            sampling = {"temperature": temperature, "max_tokens": max_reason_tokens, "stop": [VERDICT]}
            completion = await self._ask(prompt, sampling)
            cut = completion.finish_reason == "length"
            reasons, reached = self._reasons(completion.tokens.tolist())
        text = str(self._tokenizer.decode(reasons))
        if is_thinking(text) or (self._opens_thinking and "</think>" not in text):
            asked = [*closing, *asked]
        last = await self._ask(
            [*prompt, *reasons, *asked], {"temperature": 1.0, "max_tokens": 1, "allowed_token_ids": [yes, no]}
        )
        return Verdict(
            probability=_probability(last, yes, no),
            reasons=str(self._tokenizer.decode(reasons, skip_special_tokens=True)).strip(),
            num_reason_tokens=len(reasons),
            reached=reached,
            cut=cut,
        )

    def word_ids(self, words: tuple[str, str]) -> tuple[int, int]:
        """The tokens of the two verdict words; ConfigError where they are not one token each, and different."""
        ids = [self._encode(word) for word in words]
        if any(len(tokens) != 1 for tokens in ids) or ids[0] == ids[1]:
            raise ConfigError(
                f"the verdict words {words[0]!r} and {words[1]!r} are {len(ids[0])} and {len(ids[1])} tokens of "
                f"{self._path!r}; choose two different words of one token each"
            )
        return ids[0][0], ids[1][0]

    async def _ask(self, prompt: Sequence[int], sampling: Mapping[str, Any]) -> Completion:
        request = {"temperature": 0.0, "top_p": 1.0, "stop": [], **sampling}
        failure: Exception | None = None
        for _ in range(self._retries + 1):
            try:
                completion: Completion = await self._engine.generate(prompt, sampling=request)
                return completion
            except (ValueError, TypeError):  # the request is wrong, and would be again
                raise
            except Exception as error:  # an engine that is reached by reference raises errors of its own
                failure = error
                log.warning("the judge %r failed: %s: %s", self._path, type(error).__name__, error)
        raise ActorError(
            f"the judge {self._path!r} failed {self._retries + 1} times, at last with "
            f"{type(failure).__name__}: {failure}"
        ) from failure

    def _reasons(self, tokens: list[int]) -> tuple[list[int], bool]:
        """What the model wrote up to its end of turn or to the verdict's place, and whether it reached that."""
        special = set(self._tokenizer.all_special_ids)
        while tokens and tokens[-1] in special:
            tokens = tokens[:-1]
        text = str(self._tokenizer.decode(tokens))
        kept = text.find(VERDICT)
        if kept < 0:
            return tokens, False
        while tokens and len(self._tokenizer.decode(tokens)) > kept:
            tokens = tokens[:-1]
        return tokens, True

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _check_started(self) -> None:
        if self._engine is None:
            raise ActorError(f"the judge {self._path!r} is not running; await start() first")

    def _check_room(self, prompt: Sequence[int], budget: int) -> None:
        if len(prompt) + budget > self.config.max_model_tokens:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and {budget} to write do not fit the judge {self._path!r}, which "
                f"has max_model_tokens={self.config.max_model_tokens}; raise it, or shorten tasks and references"
            )


def content_text(message: Message) -> str:
    """The text of a message, whose content is a string or a list of parts with `text`."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content or () if "text" in part)


def _engine_config(options: Mapping[str, Any]) -> ActorsConfig:
    known = [field.name for field in dataclasses.fields(ActorsConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r} for a judge's engine; {hint}")
    return ActorsConfig(**{"max_model_tokens": DEFAULT_MODEL_TOKENS, **options})


def _probability(completion: Completion, yes: int, no: int) -> float:
    """P(yes) from the one token that was sampled among the two: its log-prob is normalised over them."""
    if len(completion.tokens) != 1 or int(completion.tokens[0]) not in (yes, no):
        raise ActorError(f"a judge's engine wrote {completion.tokens.tolist()} where only {yes} or {no} was allowed")
    sampled = min(math.exp(float(completion.logprobs[0])), 1.0)
    return sampled if int(completion.tokens[0]) == yes else 1.0 - sampled
