"""Answers that exist already, in a table or written by a program, as samples: graded, counted, with their lengths."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlsys.demonstrations import Demonstration
from rlsys.errors import ConfigError, DataError
from rlsys.plugins import check_options, resolve
from rlsys.run_chat import run_chat
from rlsys.run_rewards import RunRewards
from rlsys.samplers import SKIPPED, Answers, SamplerContext
from rlsys.samples import Sample
from rlsys.stages.common import load_problems
from rlsys.stages.offline import to_rollout
from rlsys.types import Problem

NO_ANSWER = f"{SKIPPED}no_answer: the source has no answer to this prompt"


class GivenAnswers:
    """A sampler that writes nothing: it finds the answers to a problem among demonstrations, and grades them.

    Args:
        demonstrations: A source as of `sft.demonstrations`: `{use: ..., options: {...}}`, called with the
            training problems. An answer belongs to the problem that has its prompt.
    """

    uses_rollout_actors = False

    def __init__(self, *, demonstrations: Mapping[str, Any]) -> None:
        place = "samples.STAGE.sampler.options.demonstrations"
        if not isinstance(demonstrations.get("use"), str) or set(demonstrations) - {"use", "options"}:
            raise ConfigError(f"{place} is {dict(demonstrations)}; write {{use: module:function, options: {{...}}}}")
        self._make = resolve(demonstrations["use"], place=f"{place}.use")
        self._options, self._use = dict(demonstrations.get("options") or {}), demonstrations["use"]
        check_options(self._make, self._options, place=place, given=1)
        self._rewards: RunRewards | None = None

    async def start(self, context: SamplerContext) -> None:
        """Read the answers and start the rewards."""
        found: Sequence[Demonstration] = self._make(load_problems(context.config, "train"), **self._options)
        if not found:
            raise DataError(f"samples.{context.stage}: {self._use} gave no answer")
        self._answers: dict[str, list[Demonstration]] = defaultdict(list)
        for demonstration in found:
            if demonstration.turns:
                raise DataError(
                    f"samples.{context.stage}: {self._use} gave a chat of several turns (problem "
                    f"{demonstration.problem.id!r}), which is no answer to one prompt; take `response` or `turns: each`"
                )
            self._answers[_key(demonstration.problem)].append(demonstration)
        self._chat = await run_chat(context.config, str(context.model))
        self._provenance = {**context.provenance, "sampler": "given", "source": self._use, "options": self._options}
        self._rewards = RunRewards(context.config)
        await self._rewards.start()

    async def sample(self, problem: Problem, *, size: int) -> Answers:
        """The first `size` answers to this problem that the source has."""
        assert self._rewards is not None
        samples: list[Sample] = []
        dropped: dict[str, int] = {}
        found = self._answers.get(_key(problem), [])[:size]
        for demonstration in found:
            turn = to_rollout(demonstration, self._chat)
            transcript = str(self._chat.tokenizer.decode(turn.tokens.tolist()))
            rollout = self._chat.hide_thought(replace(turn, response=demonstration.text, transcript=transcript))
            group = await self._rewards.grade(problem, [rollout])
            for reason, count in group.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
            samples += [
                Sample(
                    demonstration=Demonstration(problem=problem, segments=demonstration.segments),
                    num_tokens=graded.num_trained_tokens,
                    correct=bool(graded.metrics["correct"]) if "correct" in graded.metrics else None,
                    reward=graded.reward,
                    metrics=graded.metrics,
                    provenance=self._provenance,
                )
                for graded in group.rollouts
            ]
        if len(found) < size:
            dropped[NO_ANSWER] = size - len(found)
        return Answers(samples=samples, dropped=dropped)

    async def close(self) -> None:
        """End the rewards; nothing where they did not start."""
        if self._rewards is not None:
            await self._rewards.close()


def _key(problem: Problem) -> str:
    return json.dumps([dict(message) for message in problem.prompt], sort_keys=True)
