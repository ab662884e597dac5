"""The reward of reasoning-gym's own verifiers, which accept every right answer of a task that has more than one."""

from __future__ import annotations

import base64
import difflib
import json
import logging
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.interfaces import RewardResult
from rlsys.plugins import check_options
from rlsys.rewards.math import find_answer
from rlsys.rewards.sandbox import Sandbox, SandboxError
from rlsys.types import Problem, Rollout

log = logging.getLogger(__name__)

MAX_ANSWER_CHARACTERS = 20_000  # the largest grids of reasoning-gym have a tenth of that


class ReasoningGymReward:
    r"""Scores the final answer of a response by the verifier of the reasoning-gym task named in `problem.source`.

    The answer is found as `MathReward` finds it: the last `\boxed{...}`, else the last `<answer>...</answer>`, else
    what follows the last "answer is", and so on. The verifier gets it with the problem's question, answer and metadata,
    as `rlsys.data:reasoning_gym_problems` keeps them. A verifier whose verdict depends on the options of its task needs
    them again in `tasks` (the same mapping as the problems' source has).

    Every answer is graded in a sandbox session of its own, because some verifiers evaluate it as Python. The sandbox
    protects the host; the verdict is protected by refusing, before it is evaluated, whatever is not a literal or a
    plain expression of numbers, operators and, outside of games, single letters and names such as `sqrt`
    (`reasoning_gym_cell.py`). Two verifiers that pass wrong answers are mended: that of `game_of_life_halting` takes
    any text, that of `puzzle24` any four numbers. Beyond that each is as strict as its authors made it.

    `status` is "correct" (the verifier gave 1), "wrong", "no_answer", "timeout" (of `timeout_seconds`) or "error" (the
    sandbox failed, or the verifier cannot grade the known answer either). Only "correct" scores `correct`, all else
    `wrong`. With `partial` a score between 0 and 1 counts in proportion; many verifiers give a little for any answer.

    `sandbox` are further options of `rlsys.tools.python:PythonTool`. Raises ValueError for a problem of an unknown
    task, ConfigError for options that a task does not have.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Mapping[str, Any]] | None = None,
        partial: bool = False,
        timeout_seconds: float = 5.0,
        max_parallel: int | None = None,
        correct: float = 1.0,
        wrong: float = 0.0,
        sandbox: Mapping[str, Any] | None = None,
    ) -> None:
        self.tasks = {task: dict(options or {}) for task, options in (tasks or {}).items()}
        _check_tasks(self.tasks)
        self.partial = partial
        self.correct = correct
        self.wrong = wrong
        self._sandbox = Sandbox(
            Path(__file__).resolve().with_name("reasoning_gym_cell.py"),
            timeout_seconds=timeout_seconds,
            max_parallel=max_parallel,
            options=sandbox or {},
            place="ReasoningGymReward.sandbox",
            preload=("reasoning_gym",),
        )

    @property
    def tier(self) -> str | None:
        """How well answers are isolated (see `PythonTool`); None before `start`."""
        return self._sandbox.tier

    async def start(self) -> None:
        """Start the sandbox; RuntimeError where this host cannot isolate sessions or has no reasoning-gym."""
        await self._sandbox.start()
        job = {"task": "products", "options": {}, "answer": "6", "entry": {"answer": "6", "metadata": {}}}
        if (verdict := await self._ask(job)) != {"score": 1.0}:
            raise RuntimeError(f"reasoning-gym's verifiers do not work in the sandbox: {verdict}")

    async def close(self) -> None:
        """End the sandbox with whatever runs in it."""
        await self._sandbox.close()

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Grade one response; see the class."""
        answer = (find_answer(response) or "").strip()
        status, value = await self._grade(problem, answer)
        share = min(1.0, max(0.0, value)) if self.partial else float(status == "correct")
        score = self.wrong + (self.correct - self.wrong) * share
        return RewardResult(score=score, status=status, extracted=answer[:MAX_ANSWER_CHARACTERS] or None)

    async def _grade(self, problem: Problem, answer: str) -> tuple[str, float]:
        if not answer:
            return "no_answer", 0.0
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return "wrong", 0.0
        question = "\n".join(str(message["content"]) for message in problem.prompt if message["role"] == "user")
        entry = {"question": question, "answer": problem.answer, "metadata": dict(problem.metadata)}
        options = self.tasks.get(problem.source, {})
        verdict = await self._ask({"task": problem.source, "options": options, "answer": answer, "entry": entry})
        if "unknown" in verdict:
            near = "".join(f" (did you mean {name!r}?)" for name in verdict["unknown"])
            raise ValueError(
                f"problem {problem.id!r}: Problem.source is {problem.source!r}, which is no task of reasoning-gym{near}"
            )
        if "late" in verdict:
            return "timeout", 0.0
        value = verdict.get("score")
        if not isinstance(value, float) or not math.isfinite(value):
            log.warning("problem %r of task %r cannot be graded: %s", problem.id, problem.source, verdict)
            return "error", 0.0
        return ("correct" if value >= 1.0 else "wrong"), value

    async def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """What the session shows for a job, `late` where its time was up, `failed` where it shows nothing sensible.

        The job is pickled, because metadata hold tuples and numbers as keys; nothing is unpickled here.
        """
        try:
            ran = await self._sandbox.run(base64.b64encode(pickle.dumps(dict(job))).decode())
            if ran.too_slow:
                return {"late": True}
            verdict = json.loads(ran.text) if ran.ok else None
        except (SandboxError, ValueError) as error:
            return {"failed": str(error)}
        return verdict if isinstance(verdict, dict) else {"failed": ran.text[-500:]}


def _check_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    if not tasks:
        return
    from reasoning_gym.factory import DATASETS

    for task, options in tasks.items():
        if task not in DATASETS:
            near = "".join(f" (did you mean {name!r}?)" for name in difflib.get_close_matches(task, DATASETS, n=1))
            raise ConfigError(f"ReasoningGymReward.tasks: unknown reasoning-gym task {task!r}{near}")
        check_options(DATASETS[task][1], options, place=f"ReasoningGymReward.tasks.{task}")
