r"""Where the final answer stands in a response."""

from __future__ import annotations

import re
from typing import Literal

from rlsys.rewards.untrusted import behind_thinking

MAX_ANSWER_CHARACTERS = 4096
"""No answer is longer; a response that stuffs its box is wrong, not work."""
MAX_BOXES = 16
"""So many of the last boxes are looked at for one that ends."""

AnswerForm = Literal["any", "boxed", "tag", "phrase", "bare"]

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\f?boxed\s*\{")
_PHRASE = re.compile(r"answer\s*(?:is\s*:?|:)\s*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
# Up to the next beginning at most: else a flood of beginnings without an end would be looked through from each of them.
_INLINE = re.compile(r"\$([^$\n]+)\$|\\\(((?:(?!\\\().)+?)\\\)")
_LAST_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]", re.DOTALL)
_LAST_NUMBER = re.compile(r"(?<![\w.,/])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?%?(?![\w/])", re.ASCII)


def find_answer(response: str, *, form: AnswerForm = "any") -> str | None:
    r"""The text of the final answer behind the thinking; None where there is none.

    It is the last `\boxed{...}`, else the last `<answer>...</answer>`, else what follows the last "answer is" or
    "answer:", else the last formula or number of the last line; this last one does not help a response that has begun
    a box or a tag and not ended it. Another `form` than "any" takes only that one.
    """
    text = behind_thinking(response) if "think>" in response else response
    if text is None:
        return None
    finders = {"boxed": find_boxed, "tag": _find_tag, "phrase": _find_phrase, "bare": _find_bare}
    if form != "any":
        return finders[form](text)
    for name, find in finders.items():
        if name == "bare" and ("\\boxed" in text or "<answer>" in text):
            return None  # cut off in the middle of an answer, of which the number at the end may be a part
        if (found := find(text)) is not None:
            return found
    return None


def find_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` that ends, the inner one of two.

    One whose end is more than MAX_ANSWER_CHARACTERS away is given so far: it is too long for an answer, and no earlier
    box is the last one.
    """
    end = len(text)
    for _ in range(MAX_BOXES):
        end = text.rfind("boxed", 0, end)
        if end < 0:
            return None
        start = text.rfind("\\", max(0, end - 2), end)
        opening = _BOX.match(text, start) if start >= 0 and not _is_escaped(text, start) else None
        if opening and (content := _balanced(text, opening.end())) is not None:
            return content
    return None


def _is_escaped(text: str, backslash: int) -> bool:
    r"""Whether an odd number of backslashes stands in front: `\\boxed` is a line break and a word."""
    before = text[max(0, backslash - 64) : backslash]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _balanced(text: str, start: int) -> str | None:
    """What stands from here to the brace that closes; None where none does."""
    depth = 1
    limit = start + MAX_ANSWER_CHARACTERS + 1
    for mark in _BRACES.finditer(text, start, min(limit, len(text))):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return text[start : mark.start()]
    return text[start:limit] if limit < len(text) else None


def _find_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _find_phrase(text: str) -> str | None:
    start = -1
    for phrase in _PHRASE.finditer(text):
        start = phrase.end()
    if start < 0:
        return None
    sentence = text[start : start + 2 * MAX_ANSWER_CHARACTERS]
    if (stop := _SENTENCE_END.search(sentence)) is not None:
        sentence = sentence[: stop.start()]
    inline = _INLINE.search(sentence)
    return ((inline[1] or inline[2]) if inline else sentence).strip() or None


def _find_bare(text: str) -> str | None:
    """A last line that is short enough to be an answer, or the last formula or number of the last line."""
    line = text.rstrip().rpartition("\n")[2][-MAX_ANSWER_CHARACTERS:]
    for pattern in (_LAST_FORMULA, _LAST_NUMBER):
        if all_found := list(pattern.finditer(line)):
            return next(filter(None, all_found[-1].groups()), all_found[-1][0])
    return None
