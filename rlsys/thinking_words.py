"""Words that tell how a policy thinks, and the share of responses in which they occur.

STILL-3 (arXiv 2503.04548) watches verification, reflection and correction: about a tenth of the responses have such
words before training, and the share rises. That a word counts wherever it begins ("confirmed", but not "incorrect"), in
upper and lower case, is our reading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

THINKING_WORDS: Mapping[str, tuple[str, ...]] = {
    "verification": ("verify", "double check", "confirm"),
    "reflection": ("however", "reflect", "wait"),
    "correction": ("correct", "revise", "adjust"),
}

_PATTERNS = {
    kind: re.compile(rf"\b(?:{'|'.join(words)})".replace("double check", "double[- ]check"), re.IGNORECASE)
    for kind, words in THINKING_WORDS.items()
}


def thinking_ratios(responses: Sequence[str]) -> dict[str, float]:
    """By kind, as `words/verification`: the share of responses with at least one of its words."""
    return {
        f"words/{kind}": sum(pattern.search(response) is not None for response in responses) / len(responses)
        for kind, pattern in _PATTERNS.items()
        if responses
    }
