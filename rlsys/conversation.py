"""Demonstrations on the token axis of a rollout: a turn as it would be generated, a chat as its template writes it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rlsys.chat import Chat
from rlsys.demonstrations import Demonstration, Segments
from rlsys.errors import DataError
from rlsys.types import Rollout

_THINK = "<think>"
_OPENING_TOKENS = 16
_OPENED = re.compile(r"<think>\s*\Z")


def to_rollout(demonstration: Demonstration, chat: Chat) -> Rollout:
    """A demonstration as a rollout that no engine of this run wrote.

    As it was recorded, under the same chat; else each segment tokenized by itself, as in a rollout; a chat of several
    turns in the very text of its template, cut where the assistant begins and ends to write.

    Raises:
        DataError: the template does not let a chat be one sequence; names the problem and what to do.
    """
    recorded = demonstration.recorded
    if recorded is not None and recorded.template == chat.fingerprint:
        return untaught(recorded.tokens, recorded.loss_mask)
    tokens = [] if demonstration.turns else chat.render(demonstration.problem)
    mask = [False] * len(tokens)
    turns = demonstration.turns
    for text, trained in _of_turns(demonstration, chat) if turns else _of_segments(demonstration, chat, tokens):
        ids = chat.encode(text)
        tokens += ids
        mask += [trained] * len(ids)
    return untaught(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.bool_))


def untaught(tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> Rollout:
    """A rollout that no engine of this run wrote."""
    return Rollout(
        tokens=tokens,
        loss_mask=mask,
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=np.full(len(tokens), -1, dtype=np.int32),
    )


def _of_segments(demonstration: Demonstration, chat: Chat, prompt: Sequence[int]) -> Segments:
    """Segments, and the end of a complete turn; thinking that the prompt opens already is not opened again."""
    segments = list(demonstration.segments)
    opened = _OPENED.search(str(chat.tokenizer.decode(prompt[-_OPENING_TOKENS:])))
    if segments and opened and segments[0][0].startswith(_THINK):
        text, trained = segments[0]
        segments[0] = (text.removeprefix(_THINK).lstrip("\n"), trained)
    end = ((str(chat.tokenizer.eos_token), True),) if demonstration.complete else ()
    return (*segments, *end)


def _of_turns(demonstration: Demonstration, chat: Chat) -> Iterator[tuple[str, bool]]:
    """The template's own text in pieces: what is read, and what the assistant writes with its end of turn."""
    messages = [*demonstration.problem.prompt, *demonstration.turns]
    first = len(demonstration.problem.prompt)
    mine = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    written = ""
    for index in mine:
        before = chat.transcribe(messages[:index], opens_turn=True)
        after = chat.transcribe(messages[: index + 1], opens_turn=False)
        if not before.startswith(written):
            raise DataError(
                f"problem {demonstration.problem.id!r}: the chat template writes an earlier turn of the assistant "
                f"differently once others follow (it leaves out earlier thinking, say): {_parting(written, before)}; "
                "one sequence cannot train all turns then: set `turns` to `each` (a sequence for each) or `last`"
            )
        if not after.startswith(before):
            raise DataError(
                f"problem {demonstration.problem.id!r}: the chat template does not write the assistant's turn behind "
                f"its own opening of one: {_parting(before, after)}; name a column with the raw answer as `response`"
            )
        turn = after[len(before) :]
        end = turn.rfind(mark) + len(mark) if (mark := str(chat.tokenizer.eos_token)) in turn else len(turn.rstrip())
        yield before[len(written) :], False
        yield turn[:end], True
        written = before + turn[:end]


def _parting(expected: str, found: str) -> str:
    """Where two texts part, for a message."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, found, strict=False))
    at = sum(1 for _ in same)
    begin = max(0, at - 20)
    return f"{expected[begin : at + 30]!r} became {found[begin : at + 30]!r}"
