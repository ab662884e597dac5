"""Text that somebody wrote who wants a good grade, and how it reaches a judge as nothing but text.

Three doors are closed: characters that people cannot see, texts that a tokenizer turns into control tokens, and the
end of the quotation, which carries a code that the author cannot know.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import unicodedata
from collections.abc import Sequence

MAX_CHARACTERS_PER_TOKEN = 32
"""A text with more characters than this for each token it may have is too long, and is not tokenized to find out."""

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_HIDDEN = {"Cc", "Cf", "Co", "Cs"}  # control, format (zero-width, bidirectional, tags), private use, lone surrogates
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # variation selectors can carry a hidden text


def behind_thinking(text: str, *, thinks: bool = False) -> str | None:
    """What stands behind the last `</think>`, stripped; None where thinking is not closed or nothing follows.

    `thinks` is for models whose chat template opens the thinking, so that the text itself has no `<think>`: then a
    text without `</think>` is unclosed as well.
    """
    _, closed, rest = text.rpartition(_THINK_CLOSE)
    if _THINK_OPEN in rest or (thinks and not closed):
        return None
    return rest.strip() or None


def is_thinking(text: str) -> bool:
    """Whether the text ends inside a `<think>` that is not closed."""
    return _THINK_OPEN in text.rpartition(_THINK_CLOSE)[2]


def visible(text: str) -> str:
    """The text without invisible characters, which a model reads and a person does not; line feeds and tabs stay."""
    if text.replace("\n", "").replace("\t", "").isprintable() and _SELECTORS.search(text) is None:
        return text
    text = _SELECTORS.sub("", text)
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in _HIDDEN)


class Fence:
    """Codes for quotations whose end cannot be forged: made from a secret, which dies with the process, and the task.

    One task has one code, so that equal responses get equal grades and an engine that caches prefixes reads the task
    once for all of them.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = secrets.token_bytes(32) if secret is None else secret

    def code(self, task: Sequence[tuple[str, str]]) -> str:
        """16 hexadecimal digits for the named texts of a task."""
        return hmac.new(self._secret, repr(list(task)).encode(), hashlib.sha256).hexdigest()[:16]


def quote(name: str, text: str, code: str) -> str:
    """The text between its two lines."""
    return f"[BEGIN {name} {code}]\n{text}\n[END {name} {code}]"
