"""The reward for a right final answer to a mathematics problem."""

from __future__ import annotations

from pathlib import Path

from rlsys.interfaces import RewardResult
from rlsys.rewards.answers.equality import same, same_numbers
from rlsys.rewards.answers.finding import MAX_ANSWER_CHARACTERS, AnswerForm, find_answer, find_boxed
from rlsys.rewards.answers.spelling import normalize
from rlsys.rewards.pool import WorkerPool
from rlsys.types import Problem, Rollout

MAX_BRACKETS = 200
"""No answer has more of them; parsers need exponential time for some that do."""
FORMS = ("any", "boxed", "tag", "phrase", "bare")


class MathReward:
    r"""Scores the final answer of a response against `problem.answer` by mathematical equality.

    What stands inside of the thinking does not count. Behind it, the answer is the last `\boxed{...}`, else the last
    `<answer>...</answer>`, else what follows the last "answer is" or "answer:", else the last formula or number of the
    last line; with another `form` than "any" only a box ("boxed"), a tag ("tag"), and so on, counts.

    Equality is decided by exact arithmetic where that is possible (`rlsys.rewards.answers.equality`: most answers, in
    microseconds), else by Math-Verify and then by SymPy in one of `num_workers` processes, which is killed after
    `timeout_seconds` of work on one pair.

    `status` is "correct", "wrong", "no_answer", "timeout" or "error" (the worker died, or the reference answer cannot
    be parsed). "correct" scores `correct`, "wrong" and "no_answer" score `wrong`; "timeout" and "error" are failures of
    the grading, which the reward's `on_failure` decides on. Raises ValueError for a problem without an answer and
    `WorkerError` where no worker can start.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float = 0.5,
        num_workers: int = 1,
        correct: float = 1.0,
        wrong: float = 0.0,
        form: AnswerForm = "any",
    ) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        self.correct = correct
        self.wrong = wrong
        self.form: AnswerForm = form
        program = Path(__file__).resolve().with_name("math_worker.py")
        self._pool = WorkerPool(program, num_workers=num_workers, timeout_seconds=timeout_seconds)

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Grade one response; see the class."""
        if problem.answer is None or not problem.answer.strip():
            raise ValueError(
                f"problem {problem.id!r} has no answer, which MathReward compares with; set Problem.answer"
            )
        found = find_answer(response, form=self.form)
        status = await self._grade(problem.answer, found)
        score = self.correct if status == "correct" else self.wrong
        return RewardResult(score=score, status=status, extracted=found and found[:MAX_ANSWER_CHARACTERS])

    async def _grade(self, reference: str, found: str | None) -> str:
        if found is None:
            return "no_answer"
        if (decided := same_numbers(reference, found)) is not None:
            return "correct" if decided else "wrong"
        if len(found) > MAX_ANSWER_CHARACTERS or sum(map(found.count, "([{")) > MAX_BRACKETS:
            return "wrong"
        answer = normalize(found)
        if not answer:
            return "no_answer"
        gold = normalize(find_boxed(reference) or reference)
        if (decided := same(gold, answer)) is not None:
            return "correct" if decided else "wrong"
        try:
            verdict = await self._pool.ask({"gold": gold, "answer": answer})
        except TimeoutError:
            return "timeout"
        return verdict if verdict in ("correct", "wrong") else "error"

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()


__all__ = ["MathReward", "find_answer"]
