"""A conversation as a learned grader reads it: the chat template around an answer that cannot give it orders."""

from __future__ import annotations

import itertools
import re
import secrets
from typing import Any

from rlsys.errors import ConfigError
from rlsys.types import Problem

_BRACKETED = re.compile(r"\s*[<\[].*[>\]]\s*", re.DOTALL)


class GraderText:
    """Problem and answer as one conversation in the template of `tokenizer`, for a reward model and for its training.

    Raises:
        ConfigError: the tokenizer, of the model `name`, has no chat template, or one that does not write an assistant's
            turn once.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(f"the tokenizer of {name!r} has no chat template; add one to tokenizer_config.json")
        self._tokenizer, self._name, self._plain = tokenizer, name, PlainEncoder(tokenizer)

    def render(self, problem: Problem, answer: str) -> tuple[list[int], list[int]]:
        """Token ids in front of the answer, and those of the answer and of what the template writes behind it."""
        mark = f"MARK{secrets.token_hex(8)}"
        messages = [*({**message} for message in problem.prompt), {"role": "assistant", "content": mark}]
        text = str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        before, found, after = text.partition(mark)
        if not found or mark in after:
            raise ConfigError(f"the chat template of {self._name!r} does not write an assistant's turn once")
        encode = self._tokenizer.encode
        own = self._plain.encode(answer)
        return encode(before, add_special_tokens=False), [*own, *encode(after, add_special_tokens=False)]


class PlainEncoder:
    """Turns text into tokens of which none controls the model.

    Control tokens are a tokenizer's special ones (`<|im_end|>`) and those of its added ones that stand in brackets
    (`<think>`, `<tool_call>`, `[INST]`). A text that spells one is cut inside the spelling, so that the pieces are
    ordinary tokens that decode to the same text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        controls = {index: str(token.content) for index, token in added.items() if _controls(token)}
        self.control_ids = frozenset(controls) | frozenset(tokenizer.all_special_ids)
        spellings = sorted({text.strip() for text in controls.values()} - {""}, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, nothing added."""
        tokens: list[int] = []
        for piece in self._pieces(text):
            found = self._ids(piece)
            if not self.control_ids.isdisjoint(found):  # a tokenizer that normalises can still make one of it
                by_character = (token for character in piece for token in self._ids(character))
                found = [token for token in by_character if token not in self.control_ids]
            tokens += found
        return tokens

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _pieces(self, text: str) -> list[str]:
        if self._spelling is None:
            return [text]
        cuts = [match.start() + 1 for match in self._spelling.finditer(text)]
        edges = [0, *cuts, len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(edges) if begin < end]


def _controls(token: Any) -> bool:
    return bool(token.special) or _BRACKETED.fullmatch(token.content) is not None
