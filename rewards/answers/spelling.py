r"""One spelling for answers that can be written in several ways."""

from __future__ import annotations

import re
import unicodedata

_MIXED = re.compile(r"(\d+)\s+(\d+)\s*/\s*(\d+)", re.ASCII)
_ROOT = re.compile(r"√\s*(\d+|[a-z]|\([^()]*\))")
_THOUSANDS = re.compile(r"(?<=\d)(?:\s*,\s*\\!\s*|\\,|\\ |\{,\}|,\\,|'|_)(?=\d{3}(?!\d))", re.ASCII)
_SPACED_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?", re.ASCII)
_EXPONENT = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})", re.ASCII)
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "°": "^\\circ ", "％": "%"}  # noqa: RUF001
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅕": " 1/5", "⅛": " 1/8", "⁄": "/"}  # noqa: RUF001
    | dict.fromkeys("\u00a0\u2009\u202f\u2007", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")
)
_REPEATING = re.compile(r"(\d*\.\d*?)(\d{1,6})\2{2,}\s*(?:\.\.\.|\\ldots|\\dots|\\cdots)")  # quadratic: for short texts
_DOT = re.compile(r"\\dot\s*\{(\d)\}")
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_GAP = re.compile(r"\\\\\s*\[\s*[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]")
_PREFACE = re.compile(r"^\\text\s*\{[^{}]*\b(?:is|are|equals)\s*(?::\s*)?\}\s*(?=\S)")
_WRAPPER = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|text|textbf|textrm|textit|mbox)\s*\{(.*)\}|\{(.*)\}", re.DOTALL
)
_CHOOSE = re.compile(r"\{([^{}]+?)\\choose\b([^{}]+)\}")
_COUNTED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_COUNTED.split())}
_WORDS = re.compile(r"(?:\\text(?:bf|rm)?\{)?(negative |minus )?([A-Za-z ]+)\.?\}?")
_MAX_SHORT = 60
_MAX_WRAPPERS = 8
"""Characters of a text that can be a number in words, or decimals that repeat."""


def normalize(answer: str) -> str:
    """The answer without its delimiters, a closing period and spacing commands, with common Unicode signs in LaTeX.

    Runs in the event loop on what a policy wrote: no pattern here may be worse than linear in a long text.
    """
    text = answer.strip() if answer.isascii() else _to_ascii(answer).strip()
    for left, right in _DELIMITERS:
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner and left not in inner and right not in inner:
            text = inner.strip()
    if "\\" in text:
        text = _without_decoration(text)
    text = _THOUSANDS.sub("", text).replace("\\!", "").replace("{,}", ".").replace("\\$", "$")
    if text.endswith(("...", "dots")) and len(text) <= _MAX_SHORT:
        text = _REPEATING.sub(r"\1\\overline{\2}", text)
    text = text.rstrip(". \n")
    if text.startswith(("$", "-$")):
        text = text.replace("$", "", 1).strip()
        text += r"\text{ dollars}" if text and "dollar" not in text and "cent" not in text else ""
    if (said := _of_words(text)) is not None:
        return said
    if text[:1].isalpha():
        return text
    if mixed := _MIXED.fullmatch(text.lstrip("+-")):
        sign = "-" if text.startswith("-") else ""
        return rf"{sign}{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    if _SPACED_THOUSANDS.fullmatch(text):
        return text.replace(" ", "")
    if scientific := _EXPONENT.fullmatch(text):
        return rf"{scientific[1]}*10^{{{scientific[2]}}}"
    return text


def _without_decoration(text: str) -> str:
    """Without colours, words in front such as "the answer is", bold letters around a formula, gaps between rows."""
    text = _GAP.sub(r"\\\\", _COLOR.sub("", _DOT.sub(r"\\overline{\1}", text)))
    text = _PREFACE.sub("", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    for _ in range(_MAX_WRAPPERS):
        if not (found := _WRAPPER.fullmatch(text)) or not _is_formula(inner := found[found.lastindex or 0]):
            break
        text = inner.strip()
    return text


def _of_words(text: str) -> str | None:
    """The spelling of what is said in words: a small number, or all numbers."""
    if len(text) > _MAX_SHORT or not (found := _WORDS.fullmatch(text)):
        return None
    said = found[2].strip().lower()
    if said in ("all real numbers", "all reals"):
        return r"\mathbb{R}"
    number = _NUMBER_WORDS.get(said)
    return None if number is None else ("-" if found[1] else "") + number


def _is_formula(text: str) -> bool:
    """Whether braces match up and there is more than words in it."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and any(character.isdigit() or character in "=\\" for character in text)


def _to_ascii(text: str) -> str:
    """Digits of all scripts, superscripts and full-width letters as those of ASCII, and signs as LaTeX."""
    text = _SUPERSCRIPTS.sub(lambda found: f"^{{{found[0].translate(_PLAIN)}}}", text)
    text = _SUBSCRIPTS.sub(lambda found: f"_{{{found[0].translate(_PLAIN)}}}", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text.translate(_SIGNS)).replace("π", "\\pi ").replace("∞", "\\infty ")
    text = text.replace("٫", ".").replace("٬", ",").replace("，", ",").replace("。", ".")  # noqa: RUF001
    return "".join(
        str(unicodedata.decimal(character)) if character.isdecimal() else unicodedata.normalize("NFKC", character)
        for character in text
    )
