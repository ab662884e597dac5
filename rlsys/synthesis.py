"""Tool manipulation (STILL-3, arXiv 2503.04548): blocks of code put into chains of thought, run, and reasoned on.

A chain of thought is cut where it turns ("Wait", "But", ...), a hint that opens a block of code takes the place of the
rest, and the model goes on: it writes the block, reads what came out and reasons to the end. A further block is put
into what it wrote behind the one before. What ends correct is data for fine-tuning (`rlsys.filters:correct`).

A further block means a new rollout, with all before it as its prefix: the earlier blocks are run again, in a session
with the same seed, so their variables are there; where one says something else this time, what there was before stays.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlsys.chat import Chat
from rlsys.config import Config, SamplingConfig, require
from rlsys.demonstrations import Segments
from rlsys.errors import DataError
from rlsys.fleet import RolloutFleet
from rlsys.insertions import (
    HINTS,
    OPEN_FENCE,
    SPLIT_WORDS,
    Split,
    SplitAt,
    inserted,
    insertion,
    num_blocks,
    splits,
)
from rlsys.samplers import SKIPPED, Answers, SamplerContext
from rlsys.samples import Sample, read_samples, sample_of
from rlsys.types import Problem

NO_TRACE = f"{SKIPPED}no_trace: there is no chain of thought to put code into"
NO_PLACE = f"{SKIPPED}no_place: the chain of thought does not turn at any of the words (split_words)"
NO_ROOM = f"{SKIPPED}no_room: what stands in front of the block takes the whole budget (max_response_tokens)"
NOT_CLOSED = f"{SKIPPED}not_closed: the model did not end the block, or was not given its output within the budget"
TOO_MANY = f"{SKIPPED}too_many_blocks: the model wrote more blocks of its own than max_blocks allows"
"""Why there is no sample; besides these, what rollouts are dropped for."""


class ToolSynthesis:
    """A sampler that puts blocks of code into chains of thought.

    Args:
        source: Samples whose turns are the chains of thought, `RUN/STAGE/samples.parquet`; without, the model is asked
            for some first.
        model: Who goes on behind a hint; without, the model that the stage begins with.
        execute: Run every block and paste its output. Without, the block stands there and the model goes on.
        hints: Texts that begin a block; each ends in an open fence.
        split_words: Where a chain of thought may be cut.
        split_at: Where such a word counts: as the first one of a `sentence` or a `line`, or as any `word`.
        end: Behind this text no block is put: it ends the chain of thought.
        insertions_per_trace: So many samples of one chain of thought, each with another hint and, if it can be, cut at
            another place.
        max_blocks: Most blocks of a sample; how many are put in is drawn, evenly from 1 on.

    What is drawn depends on the run's seed, the problem and the chain of thought alone. Each sample is graded by
    itself.
    """

    def __init__(
        self,
        *,
        source: str | None = None,
        model: str | None = None,
        execute: bool = True,
        hints: Sequence[str] = HINTS,
        split_words: Sequence[str] = SPLIT_WORDS,
        split_at: SplitAt = "sentence",
        end: str = "</think>",
        insertions_per_trace: int = 1,
        max_blocks: int = 3,
    ) -> None:
        require(bool(hints), "hints is empty; give one, or leave it out for those that come along")
        for hint in hints:
            require(hint.endswith(OPEN_FENCE), f"hints: {hint!r} must end in {OPEN_FENCE!r}, which opens the block")
        require(bool(split_words) and all(split_words), f"split_words is {list(split_words)}; give words")
        places = ("sentence", "line", "word")
        require(split_at in places, f"split_at is {split_at!r}; choose {', '.join(places)}")
        require(insertions_per_trace >= 1, f"insertions_per_trace is {insertions_per_trace}; at least 1 is needed")
        require(max_blocks >= 1, f"max_blocks is {max_blocks}; at least 1 is needed")
        self._source, self._model, self._execute = source, model, execute
        self._hints, self._words, self._split_at, self._end = tuple(hints), tuple(split_words), split_at, end
        self._insertions_per_trace, self._max_blocks = insertions_per_trace, max_blocks
        self._traces: dict[str, list[Sample]] | None = None

    def check_config(self, config: Config, *, place: str) -> None:
        """Raise ConfigError where blocks are to be run, but the run has no tool that is called by fences."""
        require(
            not self._execute or (bool(config.tools) and config.chat.tool_format == "fenced"),
            f"{place}: execute=true runs ```python blocks, which takes chat.tool_format=fenced (it is "
            f"{config.chat.tool_format}) and a tool (there are {len(config.tools)}): "
            'tools: [{use: "rlsys.tools.python:PythonTool"}]; or set execute: false',
        )

    async def start(self, context: SamplerContext) -> None:
        """Read the source and start the rollout actors.

        Raises:
            ConfigError: as `check_config` says.
            DataError: the source is no file of samples, or has none.
        """
        self.check_config(context.config, place=f"samples.{context.stage}.sampler")
        # Without tools, blocks are text like any other.
        config = context.config if self._execute else replace(context.config, tools=[])
        if self._source is not None:
            self._traces = await asyncio.to_thread(_traces, self._source)
        self._context = context
        path = str(context.model) if self._model is None else self._model
        self._chat = Chat.load(path, [], config.chat)
        self._provenance = {**context.provenance, "sampler": "tool_synthesis", "model": path}
        self._provenance |= {"executed": self._execute, "source": self._source}
        self.fleet = await RolloutFleet.start(config, path)

    async def sample(self, problem: Problem, *, size: int) -> Answers:
        """Up to `size` samples, all made side by side; the blocks of one follow one another."""
        traces, lost = await self._traces_of(problem, size=-(-size // self._insertions_per_trace))
        tasks = [
            asyncio.ensure_future(self._synthesize(problem, trace, index, number))
            for index, trace in enumerate(traces)
            for number in range(min(self._insertions_per_trace, size - index * self._insertions_per_trace))
        ]
        try:
            made = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()  # nothing where it is done
        missing = next(iter(lost), NO_TRACE)
        dropped = Counter(reason for reason in made if isinstance(reason, str))
        dropped[missing] += size - len(made)
        samples = [sample for sample in made if isinstance(sample, Sample)]
        return Answers(samples=samples, dropped={reason: count for reason, count in dropped.items() if count})

    async def _traces_of(self, problem: Problem, *, size: int) -> tuple[list[Sample], Mapping[str, int]]:
        """Chains of thought, and why some are missing: the source's, or as many as are needed from the model."""
        if self._traces is None:
            name = f"{self._context.stage}-{problem.id}-trace"
            group = await self.fleet.act(problem, size=size, sampling=self._sampling, group_id=name)
            traces = [sample_of(problem, one, self._chat, provenance=self._provenance) for one in group.rollouts]
            return traces, group.dropped
        found = self._traces.get(problem.id, [])
        if found and found[0].problem.prompt != problem.prompt:
            raise DataError(
                f"{self._source}: problem {problem.id!r} is another one there than in this run; take the same problems"
            )
        return found[:size], {}

    @property
    def _sampling(self) -> SamplingConfig:
        """As the stage says; no more calls than blocks."""
        return replace(self._context.sampling, max_tool_calls=self._max_blocks)

    async def _synthesize(self, problem: Problem, trace: Sample, index: int, number: int) -> Sample | str:
        """One chain of thought with as many blocks as are drawn, fewer where it turns less often; or why with none."""
        segments = trace.demonstration.segments
        name = f"{self._context.stage}-{problem.id}-{index}-{number}"  # the same for all blocks: it seeds the session
        seed = f"{self._context.config.seed} {problem.id} {index}"
        generator = random.Random(f"{seed} {number}")
        made: Sample | str = NO_PLACE
        insertions: list[dict[str, Any]] = []
        behind = 0
        for block in range(generator.randint(1, self._max_blocks)):
            places = self._places(segments, behind)
            if not places:
                break
            drawn = (number, seed) if block == 0 else (0, f"{seed} {number} {block}")
            split, hint = insertion(places, self._hints, *drawn)
            prefix = inserted(segments, split.position, hint)
            insertions.append({"hint": hint, "word": split.word, "position": split.position})
            provenance = {
                **self._provenance,
                "trace": index,
                "trace_model": trace.provenance.get("model"),
                "insertions": list(insertions),
            }
            longer = await self._go_on(problem, prefix, name, provenance)
            if isinstance(longer, str):
                return longer if isinstance(made, str) else made  # what there was before stays
            made, segments = longer, longer.demonstration.segments
            behind = sum(len(text) for text, _ in prefix)
        return made

    def _places(self, segments: Segments, behind: int) -> list[Split]:
        found = splits(segments, words=self._words, split_at=self._split_at, end=self._end, behind=behind)
        return [split for split in found if num_blocks(segments, split.position) < self._max_blocks]

    async def _go_on(self, problem: Problem, prefix: Segments, name: str, provenance: dict[str, Any]) -> Sample | str:
        """The turn with what the model writes behind a hint, to its end; or why there is none."""
        group = await self.fleet.act(problem, size=1, sampling=self._sampling, group_id=name, prefix=prefix)
        if not group.rollouts:
            reason = next(iter(group.dropped))
            return NO_ROOM if reason == "prompt_too_long" else reason
        sample = sample_of(problem, group.rollouts[0], self._chat, provenance=provenance)
        if not _closed(sample, prefix, executed=self._execute):
            return NOT_CLOSED
        blocks = num_blocks(sample.demonstration.segments)
        if blocks > self._max_blocks:
            return TOO_MANY
        return replace(sample, provenance={**provenance, "blocks": blocks})

    async def close(self) -> None:
        """End the rollout actors; nothing where they did not start."""
        if (fleet := getattr(self, "fleet", None)) is not None:
            await fleet.close()


def _traces(path: str) -> dict[str, list[Sample]]:
    """The samples of a file by problem."""
    traces: dict[str, list[Sample]] = defaultdict(list)
    for sample in read_samples(path):
        traces[sample.problem.id].append(replace(sample, demonstration=replace(sample.demonstration, recorded=None)))
    if not traces:
        raise DataError(f"{path}: no sample is there to put code into")
    return dict(traces)


def _closed(sample: Sample, prefix: Segments, *, executed: bool) -> bool:
    """Whether the block that the prefix opens was closed and, where blocks are run, answered."""
    if executed:
        return _num_outputs(sample.demonstration.segments) > _num_outputs(prefix)
    behind = sample.text[sum(len(text) for text, _ in prefix) :]
    return behind.startswith("```") or "\n```" in behind


def _num_outputs(segments: Segments) -> int:
    return sum(not trained for _, trained in segments)
