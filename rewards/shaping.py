"""Small terms beside the grader's: form, length, repetition, language and the use of tools, each from a paper.

Each is a reward of its own, with its own weight, cap and schedule in the configuration and its own line in the logs.
Where a term is about one sibling beside another, or about the graded answer, it is a group reward.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from rlsys.interfaces import RewardResult
from rlsys.types import Problem, Rollout, RolloutGroup

ACTION_WORDS = ("however", "but", "wait", "verify", "alternatively")
"""The words that STILL-3 counts as acts of thinking (arXiv 2503.04548)."""
_WORD = re.compile(r"[^\W\d_]+")
_NOT_PROSE = re.compile(r"```.*?```|\$[^$]*\$|\\[A-Za-z]+|`[^`]*`", re.DOTALL)


class FormatReward:
    """1 where the response is `<think>...</think><answer>...</answer>` and nothing else, each tag once; else 0.

    DeepSeek-R1 (arXiv 2501.12948), in the strict reading of STILL-3's released scripts. Where the chat template opens
    the thinking, `opened` is true and the response begins inside of it.
    """

    def __init__(self, *, opened: bool = False) -> None:
        self._tags = ("<think>", "</think>", "<answer>", "</answer>")
        self._opened = opened

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Look at the tags; see the class."""
        text = ("<think>" if self._opened else "") + response.strip()
        places = [text.find(tag) for tag in self._tags]
        right = (
            text.startswith("<think>")
            and text.endswith("</answer>")
            and places == sorted(places)
            and all(text.count(tag) == 1 for tag in self._tags)
            and not text[places[1] + len("</think>") : places[2]].strip()
            and bool(text[places[2] + len("<answer>") : places[3]].strip())
        )
        return RewardResult(score=float(right), status="formed" if right else "malformed")


class OverlongPenalty:
    """0 up to `max_tokens - margin_tokens`, then falling to -1 at `max_tokens`; -1 beyond, and where it was cut off.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13); with `margin_tokens` 0 it is a hard one. Tokens are
    those that the policy wrote.
    """

    def __init__(self, *, max_tokens: int, margin_tokens: int = 0) -> None:
        if not 0 <= margin_tokens <= max_tokens:
            raise ValueError(f"margin_tokens must be from 0 to max_tokens ({max_tokens}), got {margin_tokens}")
        self._max = max_tokens
        self._margin = margin_tokens

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> float:  # noqa: ARG002
        """See the class."""
        over = rollout.num_trained_tokens - (self._max - self._margin)
        if rollout.finish_reason == "length" or over > self._margin:
            return -1.0
        return -over / self._margin if over > 0 else 0.0


class RepetitionPenalty:
    """Minus the share of n-grams of tokens that stood before in the same response: 0 for none, towards -1 for a loop.

    The n-gram penalty of "Demystifying Long Chain-of-Thought" (arXiv 2502.03373), over the whole response instead of
    token by token.
    """

    def __init__(self, *, num_tokens: int = 20) -> None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
        self._size = num_tokens

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> float:  # noqa: ARG002
        """See the class."""
        tokens = np.ascontiguousarray(rollout.tokens[rollout.loss_mask])
        count = len(tokens) - self._size + 1
        if count < 2:
            return 0.0
        data, width = tokens.tobytes(), tokens.itemsize
        different = {data[width * start : width * (start + self._size)] for start in range(count)}
        return len(different) / count - 1.0


class LanguageConsistency:
    """The share of words that are written in `script`, such as "latin", "cjk" or "cyrillic"; 1 where there is no word.

    DeepSeek-R1's language consistency reward (arXiv 2501.12948), by script instead of by dictionary: it sees Chinese
    among English, not French. Formulas and code are left out.
    """

    def __init__(self, *, script: str = "latin") -> None:
        self._script = script.upper()
        if not any(_script(letter) == self._script for letter in "aяא漢あ한αا"):  # noqa: RUF001
            raise ValueError(f"script must be one such as latin, cjk, cyrillic, greek, arabic, got {script!r}")

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> float:  # noqa: ARG002
        """See the class."""
        words = _WORD.findall(_NOT_PROSE.sub(" ", response))
        if not words:
            return 1.0
        return sum(all(_script(letter) == self._script for letter in word) for word in words) / len(words)


@functools.lru_cache(maxsize=8192)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "?").split()[0].split("-")[0]


class ToolUse:
    """`bonus` for a response that called a tool, minus `error_penalty` times the share of its calls that failed.

    ToRL (arXiv 2503.23383) takes 0.5 off for code that does not run; its authors saw no gain from it, so both are for
    study.
    """

    def __init__(self, *, bonus: float = 0.0, error_penalty: float = 0.5) -> None:
        self._bonus = bonus
        self._penalty = error_penalty

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> float:  # noqa: ARG002
        """See the class."""
        calls = rollout.metrics.get("tool_calls", 0.0)
        if not calls:
            return 0.0
        return self._bonus - self._penalty * rollout.metrics.get("tool_errors", 0.0) / calls


class LengthPenalty:
    """From 0.5 for the shortest sibling to -0.5 for the longest; a wrong one gets nothing for being short.

    Kimi k1.5 (arXiv 2501.12599, section 2.3.3). A group reward: `correct` is what the first ordinary term said.
    """

    async def score_group(self, group: RolloutGroup) -> Sequence[float]:
        """See the class."""
        lengths = [rollout.num_trained_tokens for rollout in group.rollouts]
        shortest, spread = min(lengths), max(lengths) - min(lengths)
        if not spread:
            return [0.0] * len(lengths)
        scores = [0.5 - (length - shortest) / spread for length in lengths]
        return [
            score if _is_correct(rollout) else min(0.0, score)
            for score, rollout in zip(scores, group.rollouts, strict=True)
        ]


class LengthProportional:
    """`length / max_tokens`, plus 1 for a right answer, minus 1 for a wrong one: STILL-3's RRL, a way to force length.

    A group reward, to be used instead of the grader's term (give that a weight of 0). Accuracy suffers from it
    (arXiv 2503.04548): it is there to study length hacking.
    """

    def __init__(self, *, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._max = max_tokens

    async def score_group(self, group: RolloutGroup) -> Sequence[float]:
        """See the class."""
        return [
            min(1.0, rollout.num_trained_tokens / self._max) + (1.0 if _is_correct(rollout) else -1.0)
            for rollout in group.rollouts
        ]


class ActionWords:
    """`min(A, most) / most`, plus 1 for a right answer and minus 1 for a wrong one, for A action words: STILL-3's RRA.

    A group reward like `LengthProportional`; the only one of the paper's five ways to force length that left accuracy
    alone (arXiv 2503.04548).
    """

    def __init__(self, *, most: int = 20, words: Sequence[str] = ACTION_WORDS) -> None:
        if most < 1 or not words:
            raise ValueError(f"need most >= 1 and some words, got {most} and {list(words)}")
        self._most = most
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)

    async def score_group(self, group: RolloutGroup) -> Sequence[float]:
        """See the class."""
        counts = [len(self._pattern.findall(rollout.response)) for rollout in group.rollouts]
        return [
            min(count, self._most) / self._most + (1.0 if _is_correct(rollout) else -1.0)
            for count, rollout in zip(counts, group.rollouts, strict=True)
        ]


def _is_correct(rollout: Rollout) -> bool:
    return rollout.metrics.get("correct", 0.0) > 0
