r"""The tokens of a formula, in LaTeX or as people type it: one spelling for each thing, and no spaces."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlsys.rewards.answers.exact import Unreadable


def _commands(names: str) -> frozenset[str]:
    """LaTeX commands from their names."""
    return frozenset(f"\\{name}" for name in names.split())


WRAPPED = r"\\(?:text|mbox|mathrm|mathbf|mathit|textbf|textrm|textit|operatorname|bf|rm)\s*\{[^{}]*\}"
"""Words in a formula."""
_NUMBERS = r"\d+(?:\.\d*)?|\.\d+"
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
"""A number with commas between its thousands, or several numbers of three digits."""
_TOKENS = re.compile(rf"{WRAPPED}|{_NUMBERS}|\\[A-Za-z]+|\\.|\*\*|[A-Za-z]+|\S", re.ASCII)
_UPRIGHT = re.compile(r"\\math(?:rm|bf|it)\s*\{([ie])\}")
_SPACING = _commands(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits ! , ; : > quad qquad "
    "mathrm mathbf mathit text"
) | {"\\ ", "~"}
_SAME = {
    **dict.fromkeys(_commands("dfrac tfrac cfrac"), r"\frac"),
    **dict.fromkeys(_commands("dbinom tbinom"), r"\binom"),
    **dict.fromkeys(_commands("cdot times ast"), "*"),
    **dict.fromkeys(_commands("div over"), "/"),
    **dict.fromkeys(("infinity", "inf", "oo", "Infinity", "∞"), r"\infty"),
    **dict.fromkeys((r"\leq", r"\leqslant", "≤"), r"\le"),
    **dict.fromkeys((r"\geq", r"\geqslant", "≥"), r"\ge"),
    **dict.fromkeys(("U", "\u222a"), r"\cup"),
    **{"**": "^", "pi": r"\pi", "π": r"\pi", "sqrt": r"\sqrt", "±": r"\pm", r"\%": "%", "∈": r"\in"},
    **{r"\lt": "<", r"\gt": ">", r"\lvert": "|", r"\rvert": "|", r"\lbrack": "[", r"\rbrack": "]"},
    **{r"\varnothing": r"\emptyset", "\u2205": r"\emptyset", r"\colon": ":", r"\mid": ":"},
    **{r"\lparen": "(", r"\rparen": ")", r"\lbrace": r"\{", r"\rbrace": r"\}"},
}
FUNCTIONS = _commands(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh log ln lg exp gcd lcm min max"
)
_PLAIN_FUNCTIONS = frozenset(name[1:] for name in FUNCTIONS)
GREEK = _commands(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"
)
FACTORS = FUNCTIONS | GREEK | _commands("frac sqrt binom pi infty") | {"(", "{", "["}
_OPENING, _CLOSING = frozenset(["(", "[", "{", r"\{"]), frozenset([")", "]", "}", r"\}"])


def tokenize(text: str) -> list[str]:
    """The text as tokens of one spelling each, without spaces and what only moves or sizes them."""
    tokens = [_SAME.get(token, token) for token in _TOKENS.findall(text)]
    tokens = [_UPRIGHT.sub(r"\1", token) for token in tokens]
    tokens = [token for token in tokens if token not in _SPACING]
    return [rf"\{token}" if token in _PLAIN_FUNCTIONS else token for token in tokens]


def split(tokens: Sequence[str], separators: frozenset[str]) -> list[list[str]]:
    """The parts between separators that stand outside of all brackets.

    Raises:
        Unreadable: the brackets do not match up.
    """
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in _OPENING or token == r"\begin") - (token in _CLOSING or token == r"\end")
        if depth < 0:
            raise Unreadable("a bracket that was not opened")
        if depth == 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    if depth:
        raise Unreadable("a bracket that is not closed")
    return parts


def encloses(tokens: Sequence[str]) -> bool:
    """Whether the first and the last token are a pair of brackets, of any two kinds, around all the others."""
    if len(tokens) < 2 or tokens[0] not in _OPENING or tokens[-1] not in _CLOSING:
        return False
    depth = 0
    for position, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth == 0:
            return position == len(tokens) - 1
    return False
