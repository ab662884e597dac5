"""A reward that is a grader spec, in the JSON shape of OpenAI's fine-tuning and evals interface."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import keyword
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from rlsys.errors import ConfigError
from rlsys.interfaces import RewardResult
from rlsys.plugins import run_hook
from rlsys.rewards.specs.formula import FUNCTIONS, Formula
from rlsys.rewards.specs.model import ScoreModelGrader
from rlsys.rewards.specs.python import PythonGrader
from rlsys.rewards.specs.schema import JsonSchemaGrader
from rlsys.rewards.specs.services import Services
from rlsys.rewards.specs.spec import Spec
from rlsys.rewards.specs.template import Template
from rlsys.rewards.specs.values import AbsentError, GradingError, Values, item_of, sample_of
from rlsys.types import Problem, Rollout

MAX_COMPARED_CHARACTERS = 100_000
"""A longer text is not compared by a metric; a response of that length has similarity 0."""
MAX_EXTRACTED_CHARACTERS = 4096
_WRONG = RewardResult(score=0.0, status="wrong")
_METRICS = {
    "fuzzy_match": ("rapidfuzz",),
    "bleu": ("nltk",),
    "gleu": ("nltk",),
    **{f"rouge_{n}": ("rouge_score",) for n in range(1, 6)},
    "rouge_l": ("rapidfuzz",),
}
_REFUSED_METRICS = {
    "meteor": "it needs a net of word meanings, which is not installed with any package; use gleu or rouge_l",
    "cosine": "it needs an embedding model; use score_model, or a reward of your own that holds one",
}


class Grader(Protocol):
    """One node of a spec. `absent` is its grade for a response that lacks what it looks at.

    `grade` raises AbsentError or GradingError. A grader may also have `async start()`.
    """

    absent: RewardResult

    async def grade(self, values: Values) -> RewardResult: ...


class GraderReward:
    """Grades by `spec`, a mapping with `type` and that type's keys; `docs/graders.md` has them all.

    `status` is "correct" or "wrong" for graders that pass or fail (`string_check`, `json_schema`, those with a
    `pass_threshold`), "ok" for those that grade, and "error" or "timeout", with score 0, where grading failed. The
    scores of a `multi` grader's parts are its `terms`; `extracted` is `sample.output_text`, or says why grading failed.
    A response that lacks what the spec asks for gets the lowest grade; a problem that lacks it is an error.

    `timeout_seconds` bounds each step: one comparison or validation in one of `num_workers` processes, the source of a
    `python` grader, its `grade`. `python` are further options of that grader's sandbox, `PythonTool`. `engine`
    (`{use: module:object, options: {...}}`) answers for all `score_model` graders without one of their own, within
    `engine_seconds`, and is asked again up to `retries` times. Raises ConfigError for a wrong spec.
    """

    def __init__(
        self,
        *,
        spec: Mapping[str, Any],
        timeout_seconds: float = 5.0,
        num_workers: int = 1,
        python: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        engine_seconds: float = 60.0,
        retries: int = 2,
    ) -> None:
        for name in ("timeout_seconds", "engine_seconds"):
            if not (seconds := locals()[name]) > 0:
                raise ConfigError(f"GraderReward.{name} must be positive, got {seconds}")
        if num_workers < 1 or retries < 0:
            raise ConfigError(
                f"GraderReward: num_workers is {num_workers} (at least 1), retries {retries} (at least 0)"
            )
        self._services = Services(timeout_seconds=timeout_seconds, num_workers=num_workers, python=python or {})
        self._judging: dict[str, Any] = {"engine": engine, "retries": retries, "engine_seconds": engine_seconds}
        self._started: list[Grader] = []
        self._grader = self._make(spec, "spec")

    def _make(self, fields: Any, place: str, *, inside: bool = False) -> Grader:
        spec = Spec(fields=fields, place=place)
        if "type" not in spec.fields:
            raise ConfigError(f"{place}: a grader's spec needs a `type`; known: {', '.join(TYPES)}")
        grader: Grader
        match spec.choice("type", TYPES):
            case "string_check":
                grader = StringCheckGrader(spec)
            case "text_similarity":
                grader = TextSimilarityGrader(spec, self._services)
            case "json_schema":
                grader = JsonSchemaGrader(spec, self._services)
            case "python":
                grader = PythonGrader(spec, self._services)
            case "score_model":
                grader = ScoreModelGrader(spec, self._services, **self._judging)
            case _ if inside:
                raise ConfigError(f"{place}: a multi grader inside a multi grader is not allowed; write one formula")
            case _:
                spec.check_keys(("graders", "calculate_output"), ())
                inner = f"{place}.graders"
                parts = {name: self._make(part, f"{inner}.{name}", inside=True) for name, part in _named(spec, inner)}
                grader = MultiGrader(spec, parts)
        self._started.append(grader)
        return grader

    async def start(self) -> None:
        """Start the sandbox and the engines that the spec needs; raises where one cannot start."""
        for grader in self._started:
            await run_hook(grader, "start")

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Grade one response; see the class."""
        values = {"item": item_of(problem), "sample": sample_of(response)}
        result, failure = await _graded(self._grader, values)
        return replace(result, extracted=(failure or values["sample"]["output_text"])[:MAX_EXTRACTED_CHARACTERS])

    @property
    def tier(self) -> str | None:
        """How well the code of `python` graders is isolated; None where there are none, and before `start`."""
        return self._services.python.tier

    async def close(self) -> None:
        """End processes and engines."""
        await self._services.close()


TYPES = ("string_check", "text_similarity", "python", "score_model", "multi", "json_schema")


async def _graded(grader: Grader, values: Values) -> tuple[RewardResult, str | None]:
    """The grade, and what went wrong where it failed."""
    try:
        return await grader.grade(values), None
    except AbsentError:
        return grader.absent, None
    except GradingError as error:
        return RewardResult(score=0.0, status=error.status), str(error)


class StringCheckGrader:
    """1 where `input` and `reference` compare as `operation` says, else 0.

    `eq` and `ne` compare them character by character, `like` looks for the reference inside the input, `ilike` too,
    without regard to case. Nothing contains an empty reference, which would be in every text, and a problem whose
    field is empty is an error: an empty response would be right.
    """

    absent = _WRONG

    def __init__(self, spec: Spec) -> None:
        spec.check_keys(("input", "reference", "operation"), ())
        self._input, self._reference = spec.template("input"), spec.template("reference")
        self._operation = spec.choice("operation", ("eq", "ne", "like", "ilike"))
        if not spec.text("reference") and self._operation in ("like", "ilike"):
            raise spec.wrong("reference", "is empty, and every text contains that; use `ne` to ask for some text")

    async def grade(self, values: Values) -> RewardResult:
        """Compare the two."""
        text, reference = (self._render(template, values) for template in (self._input, self._reference))
        if self._operation == "eq":
            holds = text == reference
        elif self._operation == "ne":
            holds = text != reference
        elif self._operation == "like":
            holds = bool(reference) and reference in text
        else:
            holds = bool(reference) and reference.casefold() in text.casefold()
        return RewardResult(score=float(holds), status="correct" if holds else "wrong")

    def _render(self, template: Template, values: Values) -> str:
        text = template.render(values)
        if not text and template.reads == {"item"} and self._operation != "ne":
            raise GradingError(f"{template.place} is empty for problem {values['item'].get('id')!r}")
        return text


class TextSimilarityGrader:
    """How alike `input` and `reference` are by `evaluation_metric`, in [0, 1]; it passes from `pass_threshold` on.

    Texts of more than `MAX_COMPARED_CHARACTERS` characters are not compared: similarity 0 where the text comes from
    the response, an error where it comes from the problem.
    """

    def __init__(self, spec: Spec, services: Services) -> None:
        spec.check_keys(("input", "reference", "evaluation_metric"), ("pass_threshold",))
        self._services = services
        self._templates = {"text": spec.template("input"), "reference": spec.template("reference")}
        if (reason := _REFUSED_METRICS.get(spec.text("evaluation_metric"))) is not None:
            raise spec.wrong("evaluation_metric", f"{spec.text('evaluation_metric')} is not supported: {reason}")
        self._metric = spec.choice("evaluation_metric", _METRICS)
        for library in _METRICS[self._metric]:
            if importlib.util.find_spec(library) is None:
                missing = f"{spec.place}: {self._metric} needs {library}, which is not installed"
                raise ConfigError(f'{missing}; pip install "rlsys[graders]"')
        self._threshold = spec.threshold()
        self.absent = self._result(0.0)

    async def grade(self, values: Values) -> RewardResult:
        """Compare the two in a worker process."""
        texts = {}
        for name, template in self._templates.items():
            texts[name] = text = template.render(values)
            if len(text) > MAX_COMPARED_CHARACTERS or not text.strip():
                message = f"{template.place} of problem {values['item'].get('id')!r} has {len(text)} characters"
                raise AbsentError(message) if "sample" in template.reads else GradingError(message)
        answer = await self._services.ask({"kind": "similarity", "metric": self._metric, **texts})
        return self._result(min(1.0, max(0.0, float(answer))))

    def _result(self, score: float) -> RewardResult:
        if self._threshold is None:
            return RewardResult(score=score)
        return RewardResult(score=score, status="correct" if score >= self._threshold else "wrong")


class MultiGrader:
    """The formula `calculate_output` over the scores of `graders`, which are graded side by side.

    It fails where one of them fails, whatever the formula makes of it, and where the formula has no finite value.
    """

    def __init__(self, spec: Spec, parts: Mapping[str, Grader]) -> None:
        self._parts = parts
        self._formula = Formula(spec.text("calculate_output"), list(parts), place=f"{spec.place}.calculate_output")
        self.absent = _WRONG

    async def grade(self, values: Values) -> RewardResult:
        """Grade all parts, then calculate."""
        graded = await asyncio.gather(*(_graded(part, values) for part in self._parts.values()))
        results = dict(zip(self._parts, graded, strict=True))
        for name, (result, failure) in results.items():
            if failure is not None:
                raise GradingError(f"{name}: {failure}", status=result.status)
        terms = {name: result.score for name, (result, _) in results.items()}
        try:
            score = self._formula.value(terms)
        except ZeroDivisionError:
            score = math.nan
        if not math.isfinite(score):
            raise GradingError(f"calculate_output has no finite value for {json.dumps(terms)}")
        return RewardResult(score=score, terms=terms)


def _named(spec: Spec, place: str) -> Iterator[tuple[str, Any]]:
    """The parts of a multi grader, with names that a formula can use."""
    parts = spec.mapping("graders")
    if not parts:
        raise ConfigError(f"{place}: a multi grader needs at least one grader")
    for name, part in parts.items():
        if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name) or name in FUNCTIONS:
            raise ConfigError(
                f"{place}: {name!r} cannot stand in calculate_output; use letters, digits and _, and neither "
                f"{' nor '.join(FUNCTIONS)}"
            )
        yield name, part
