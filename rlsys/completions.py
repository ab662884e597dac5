"""A client of chat completions that outlives what goes wrong between here and a server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from rlsys.errors import ConfigError, ResourceError, RlsysError, TrainingStalledError
from rlsys.plug_in_config import require

PASSING = (408, 409, 425, 429)
"""States that may pass, besides 5xx."""

PROBE_SECONDS = 20.0
MAX_MESSAGE_CHARACTERS = 200


class TeacherError(RlsysError):
    """A request that gave no answer: refused, or failed again and again; the message says how."""


class _MayPassError(Exception):
    """A failure after which the same request may succeed; `pause` is how long the server asks to wait."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One choice: its text, what it thought before where the server tells, and how it says that it ended."""

    text: str
    reasoning: str
    finish_reason: str


class Completions:
    """One endpoint. See `rlsys.teacher:OpenAiTeacher` for what the settings mean."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_variable: str | None,
        concurrency: int,
        timeout_seconds: float,
        max_attempts: int,
        retry_seconds: float,
        max_pause_seconds: float,
        give_up_seconds: float,
    ) -> None:
        require(
            base_url.startswith(("http://", "https://")), f"teacher: base_url {base_url!r} must begin with http(s)://"
        )
        # Not shown: it may be the key itself.
        require(
            api_key_variable is None or api_key_variable.isidentifier(),
            "teacher: api_key_variable is no name of an environment variable; the key itself stands in the variable "
            "and never in a configuration",
        )
        require(concurrency >= 1, f"teacher: concurrency is {concurrency}; at least 1")
        require(max_attempts >= 1, f"teacher: max_attempts is {max_attempts}; 1 asks once")
        for name, seconds in (
            ("timeout_seconds", timeout_seconds),
            ("retry_seconds", retry_seconds),
            ("max_pause_seconds", max_pause_seconds),
            ("give_up_seconds", give_up_seconds),
        ):
            require(seconds > 0, f"teacher: {name} is {seconds:g}; it must be above 0")
        self._url, self._model, self._key_variable = base_url.rstrip("/"), model, api_key_variable
        self._places = asyncio.Semaphore(concurrency)
        self._timeout_seconds, self._max_attempts = timeout_seconds, max_attempts
        self._retry_seconds, self._max_pause_seconds = retry_seconds, max_pause_seconds
        self._give_up_seconds = give_up_seconds
        self._answered = time.monotonic()
        self._http: aiohttp.ClientSession | None = None

    def headers(self) -> dict[str, str]:
        """What every request carries.

        Raises:
            ConfigError: the variable of the key is not set.
        """
        if self._key_variable is None:
            return {}
        key = os.environ.get(self._key_variable)
        require(
            bool(key),
            f"teacher: the environment variable {self._key_variable} (api_key_variable) is not set; "
            "export it where the run is started",
        )
        return {"Authorization": f"Bearer {key}"}

    async def start(self, *, tell: Callable[[str], None]) -> None:
        """Connect, and see by its list of models whether the server is there and takes the key.

        A server without such a list will do; one whose list lacks the model is told of.
        """
        self._http = aiohttp.ClientSession(headers=self.headers())
        limit = aiohttp.ClientTimeout(total=min(PROBE_SECONDS, self._timeout_seconds))
        try:
            async with self._http.get(f"{self._url}/models", timeout=limit) as response:
                data = await response.read()
                self._check_refusal(response.status, data)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            await self.close()
            raise ResourceError(
                f"teacher: nothing answers at {self._url} ({_said(error)}); start the server or set base_url"
            ) from error
        except BaseException:
            await self.close()
            raise
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            known = [model["id"] for model in json.loads(data)["data"]]
            if known and self._model not in known:
                tell(f"warning: {self._url} lists no model {self._model!r}; it lists {', '.join(map(str, known[:10]))}")
        self._answered = time.monotonic()

    async def ask(self, body: Mapping[str, Any]) -> tuple[list[Reply], Counter[str]]:
        """The choices of one request, and by reason those that have no text.

        Raises:
            TeacherError: it is refused, has no choices, or failed `max_attempts` times.
            ConfigError: the key, the address or the model is refused.
            TrainingStalledError: no request at all was answered for `give_up_seconds`.
        """
        async with self._places:
            for attempt in range(self._max_attempts):
                try:
                    data = await self._post(body)
                except _MayPassError as failure:
                    self._check_patience(failure)
                    last = failure
                else:
                    found = _choices(data)
                    if found[0]:
                        self._answered = time.monotonic()
                    return found
                if attempt + 1 < self._max_attempts:
                    await asyncio.sleep(self._pause(attempt, last))
        raise TeacherError(f"{last} (asked {self._max_attempts} times)")

    def _pause(self, attempt: int, failure: _MayPassError) -> float:
        if failure.pause is not None:
            return min(failure.pause, self._max_pause_seconds)
        # Spread, so that requests that failed together do not come back together.
        return min(self._retry_seconds * 2.0**attempt, self._max_pause_seconds) * random.uniform(0.5, 1.0)

    def _check_patience(self, failure: _MayPassError) -> None:
        silence = time.monotonic() - self._answered
        if silence > self._give_up_seconds:
            raise TrainingStalledError(
                f"teacher: {self._url} has answered nothing for {silence:.0f} s (give_up_seconds="
                f"{self._give_up_seconds:g}), at last: {failure}; when it is back, go on with --resume"
            )

    async def _post(self, body: Mapping[str, Any]) -> bytes:
        assert self._http is not None, "start() comes first"
        try:
            limit = aiohttp.ClientTimeout(total=self._timeout_seconds)
            async with self._http.post(f"{self._url}/chat/completions", json=body, timeout=limit) as response:
                data = await response.read()
                status, headers = response.status, response.headers
        except TimeoutError as error:
            raise _MayPassError(f"no whole answer within {self._timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _MayPassError(_said(error)) from error
        if status in PASSING or status >= 500:
            raise _MayPassError(f"HTTP {status}: {_words(data)}", _retry_after(headers.get("Retry-After")))
        self._check_refusal(status, data)
        if status == 404:
            raise ConfigError(
                f"teacher: {self._url}/chat/completions says 404 ({_words(data)}); correct base_url or model "
                f"({self._model!r})"
            )
        if status != 200:
            raise TeacherError(f"HTTP {status}: {_words(data)}")
        return data

    def _check_refusal(self, status: int, data: bytes) -> None:
        if status not in (401, 403):
            return
        key = "no key: set api_key_variable" if self._key_variable is None else f"the key in {self._key_variable}"
        raise ConfigError(f"teacher: {self._url} refuses {key} (HTTP {status}: {_words(data)})")

    async def close(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.close()


def _choices(data: bytes) -> tuple[list[Reply], Counter[str]]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TeacherError(f"the answer is not JSON: {_words(data)}") from error
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise TeacherError(f"the answer has no choices: {_words(data)}")
    replies = []
    without: Counter[str] = Counter()
    for choice in choices:
        reply = _reply(choice)
        if isinstance(reply, Reply):
            replies.append(reply)
        else:
            without[f"teacher_error: {reply}"] += 1
    return replies, without


def _reply(choice: Any) -> Reply | str:
    """A choice, or why it is none."""
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return "a choice without a message"
    finish = choice.get("finish_reason")
    if finish == "content_filter":
        return "withheld by its content filter"
    text, reasoning = _text(message.get("content")), ""
    for name in ("reasoning_content", "reasoning"):
        reasoning = reasoning or _text(message.get(name)) or ""
    if not text and not (reasoning and finish == "length"):
        return "a message without a text" if text is None else "an empty text"
    return Reply(text=text or "", reasoning=reasoning, finish_reason=str(finish))


def _text(content: Any) -> str | None:
    """A text, or the texts of a list of parts; None for anything else."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    # JSON may spell half characters, which no file can hold.
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else None


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None for what is neither."""
    if value is None:
        return None
    with suppress(ValueError, OverflowError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        at = parsedate_to_datetime(value)
        return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return None


def _words(data: bytes) -> str:
    """What a body says, in short: the message of an error, else its beginning."""
    text = data.decode("utf-8", "replace")
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:MAX_MESSAGE_CHARACTERS] or "(nothing)"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:MAX_MESSAGE_CHARACTERS]}" if str(error) else type(error).__name__
