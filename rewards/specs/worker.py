"""The program of a grading worker (`worker.py`): text similarity and JSON schemas, which a text can slow down.

It runs where it can be killed at any moment, because a schema's regular expression runs in C. A request is
`{"kind": "similarity", "metric", "text", "reference"}`, answered by a number in [0, 1], or `{"kind": "schema",
"pairs"}`, pairs of a schema and a text as JSON, answered by "correct" or "wrong".
"""

import contextlib
import functools
import importlib
import json
import re
from typing import Any

LIBRARIES = ("jsonschema", "rapidfuzz.fuzz", "rapidfuzz.distance", "nltk.translate", "rouge_score.rouge_scorer")
# Writing without spaces: one character is one word.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
_TOKEN = re.compile(_WORD.pattern + r"|[^\w\s]")


def similarity(metric: str, text: str, reference: str) -> float:
    """How alike two texts are, in [0, 1]; 0 where one has nothing to compare.

    - `fuzzy_match`: 2M / T, M the length of the longest common subsequence of characters and T the characters of both
      (rapidfuzz's `ratio`; not its partial ratios, in which a part of the reference is as good as all of it).
    - `bleu`: BLEU-4 of one sentence (Papineni et al. 2002) with method 1 of Chen & Cherry (2014) for counts of 0; over
      the n-grams there are where the text has fewer than 4 tokens.
    - `gleu`: Google's BLEU (arXiv 1609.08144): the lower of precision and recall of all 1- to 4-grams.
    - `rouge_1` to `rouge_5`, `rouge_l`: F1 of the n-grams, of the longest common subsequence of words (Lin 2004).

    Tokens are words and signs of any script for BLEU and GLEU, words without regard to case for ROUGE.
    """
    if metric == "fuzzy_match":
        fuzz = importlib.import_module("rapidfuzz.fuzz")
        return float(fuzz.ratio(text, reference)) / 100.0 if text and reference else 0.0
    if metric.startswith("rouge_"):
        return _rouge(metric.removeprefix("rouge_"), text, reference)
    tokens, expected = _TOKEN.findall(text), _TOKEN.findall(reference)
    if not tokens or not expected:
        return 0.0
    if metric == "gleu":
        gleu = importlib.import_module("nltk.translate.gleu_score")
        return float(gleu.sentence_gleu([expected], tokens))
    bleu = importlib.import_module("nltk.translate.bleu_score")
    smoothing = bleu.SmoothingFunction().method1
    return float(bleu.sentence_bleu([expected], tokens, smoothing_function=smoothing, auto_reweigh=True))


class Words:
    """The tokenizer for ROUGE: words of any script."""

    def tokenize(self, text: str) -> list[str]:
        """Words without regard to case."""
        return _WORD.findall(text.casefold())


def _rouge(kind: str, text: str, reference: str) -> float:
    if kind != "l":
        name = f"rouge{kind}"
        scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer([name], tokenizer=Words())
        return float(scorer.score(reference, text)[name].fmeasure)
    # In steps of 64 words, where rouge-score takes minutes for a long text.
    distance = importlib.import_module("rapidfuzz.distance")
    words, expected = Words().tokenize(text), Words().tokenize(reference)
    total = len(words) + len(expected)
    return 2.0 * distance.LCSseq.similarity(words, expected) / total if total else 0.0


@functools.lru_cache(maxsize=256)
def _validator(schema_text: str) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = json.loads(schema_text)
    return validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())  # which fetches nothing


def grade(request: dict[str, Any]) -> str:
    """The answer to one request."""
    if request["kind"] == "similarity":
        return repr(similarity(request["metric"], request["text"], request["reference"]))
    pairs = json.loads(request["pairs"])
    valid = all(_validator(schema).is_valid(json.loads(text)) for schema, text in pairs)
    return "correct" if valid else "wrong"


def warm() -> None:
    """Import what is installed now, so that no deadline pays for it."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # the reward has checked what its spec needs
            importlib.import_module(library)
