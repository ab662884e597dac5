"""Blocks of code in chains of thought: where they go, what is run, what trains, and what there is no sample for."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlsys.run
import rlsys.synthesis
from rlsys.chat import Chat
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.console import Console
from rlsys.demonstrations import Demonstration, Segments
from rlsys.errors import ConfigError, DataError
from rlsys.insertions import HINTS, SPLIT_WORDS, inserted, insertion, num_blocks, splits
from rlsys.interfaces import Session, ToolResult
from rlsys.plugins import check_options
from rlsys.records import RunDirectory
from rlsys.reward_terms import RewardTerm
from rlsys.rollout import run_rollout
from rlsys.samplers import Answers, SamplerContext
from rlsys.samples import Sample, read_samples, write_samples
from rlsys.scratch import byte_tokenizer
from rlsys.stages import Run, stage_of
from rlsys.synthesis import NO_PLACE, NO_ROOM, NO_TRACE, NOT_CLOSED, TOO_MANY, ToolSynthesis
from rlsys.types import Completion, Problem, RolloutGroup
from tests.rlsys.sampling_stage import numbered

TOKENIZER = byte_tokenizer()
TRACE = "<think>\nSo it is 4. Wait, is it? I say yes, but who knows.\nHmm, fine.\n</think>\nWait: \\boxed{4}"
CONFIG = """
name: synthesis
seed: 7
model: {path: nowhere}
data:
  train: {use: "tests.rlsys.sampling_stage:numbered", options: {size: 100}}
  held_out: {use: "tests.rlsys.sampling_stage:numbered", options: {size: 1}}
rewards: [{use: "tests.rlsys.sampling_stage:no_reward"}]
trackers: []
tools: [{use: "rlsys.tools.python:PythonTool", options: {timeout_seconds: 5, max_output_characters: 400}}]
samples: {traces: {sampling: {max_response_tokens: 1000}}}
actors: {max_model_tokens: 2048}
"""


# --- places ----------------------------------------------------------------------------------------------------------


def words_at(text: str, **options: Any) -> list[tuple[int, str]]:
    return [(split.position, split.word) for split in splits(((text, True),), **options)]


def test_a_chain_of_thought_turns_at_the_first_word_of_a_sentence_or_line() -> None:
    text = "It is 4. Wait, no. I said but. But yes.\nHmm: (is it?) Moreover so. Waiting. Furthermore"
    turns = ("Wait,", "But yes", "Hmm", "Moreover", "Furthermore")
    assert words_at(text) == [(text.index(turn), turn.split()[0].strip(",:")) for turn in turns]
    assert words_at(text, split_at="line") == [(text.index("Hmm"), "Hmm")]
    assert words_at("<think>Wait, no") == [(7, "Wait")]


def test_any_word_and_words_of_one_s_own_may_be_places() -> None:
    assert words_at("so wait, then Wait", words=["wait"], split_at="word") == [(3, "wait")]
    assert words_at("A. But then. B", words=["But then", "But"]) == [(3, "But then")]
    assert words_at("a+b", words=["+"], split_at="word") == []


def test_no_place_is_behind_the_thought_in_a_fence_in_tool_output_or_before_what_was_there() -> None:
    segments: Segments = (
        ("Wait.\n```python\nx\nWait\n```\n", True),
        ("```output\nWait\n```\n", False),
        ("Wait. But.</think>\nHmm.", True),
    )
    text = "".join(part for part, _ in segments)
    behind = text.index("Wait. But.")
    assert [split.position for split in splits(segments)] == [0, behind, behind + 6]
    assert [split.position for split in splits(segments, behind=1)] == [behind, behind + 6]
    assert [split.word for split in splits(segments, end="")] == ["Wait", "Wait", "But", "Hmm"]
    assert splits((("```python\nx = 1\nWait", True),)) == [], "a fence that is never closed"


def test_a_hint_takes_the_place_of_all_that_follows() -> None:
    segments: Segments = (("abc", True), ("out", False), ("def", True))
    assert inserted(segments, 0, "H") == (("H", True),)
    assert inserted(segments, 2, "H") == (("abH", True),)
    assert inserted(segments, 3, "H") == (("abcH", True),)
    assert inserted(segments, 6, "H") == (("abc", True), ("out", False), ("H", True))
    assert inserted(segments, 8, "H") == (("abc", True), ("out", False), ("deH", True))


def test_blocks_are_counted_that_the_policy_opened() -> None:
    segments: Segments = (("a\n```python\n1\n```\n", True), ("```python\n", False), ("b\n```python\n", True))
    assert num_blocks(segments) == 2
    assert num_blocks(segments, 10) == 0
    assert num_blocks((("say ```python", True),)) == 0


def test_the_hints_are_fourteen_different_texts_that_open_a_block() -> None:
    assert len(set(HINTS)) == 14
    assert all(hint.endswith("\n```python\n") and hint.count("```") == 1 for hint in HINTS)
    assert SPLIT_WORDS == ("Wait", "But", "Alternatively", "Hmm", "Moreover", "Furthermore")


def test_insertions_into_one_trace_differ_and_are_the_same_for_the_same_seed() -> None:
    places = splits(((TRACE, True),))
    assert len(places) == 2
    drawn = [insertion(places, HINTS, number, "7 p 0") for number in range(14)]
    assert len({(split.position, hint) for split, hint in drawn}) == 14
    assert {split.position for split, _ in drawn[:2]} == {split.position for split in places}
    assert drawn == [insertion(places, HINTS, number, "7 p 0") for number in range(14)]
    assert drawn != [insertion(places, HINTS, number, "8 p 0") for number in range(14)]


# --- the sampler -----------------------------------------------------------------------------------------------------


def problem(number: int = 2) -> Problem:
    return Problem(id=f"p{number}", prompt=({"role": "user", "content": f"1 + {number - 1}?"},), answer=str(number))


class FakeInterpreter:
    """A `python` tool that evaluates the last line of each block; its variables live as long as the session."""

    name, description = "python", "runs code"
    parameters: Mapping[str, Any] = {"type": "object"}

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.in_flight = 0

    async def open(self, rollout_id: str) -> Session:
        tool, variables = self, dict[str, Any]()

        class FakeSession:
            async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
                *lines, last = str(arguments["code"]).splitlines()
                tool.calls.append((rollout_id, last))
                tool.in_flight += 1
                await tool.work(rollout_id)
                tool.in_flight -= 1
                exec("\n".join(lines), variables)
                return ToolResult(text=str(eval(last, variables)))

            async def close(self) -> None:
                pass

        return FakeSession()

    async def work(self, rollout_id: str) -> None:
        """What a call does before it is evaluated."""


class FakeEngine:
    """Reasons wrongly, writes code where a block is open, and believes what comes out; deterministic."""

    def __init__(self, trace: str = TRACE) -> None:
        self.trace = trace
        self.prompts: list[str] = []

    def written(self, text: str) -> str:
        if text.endswith("assistant\n"):
            return self.trace
        if text.endswith("```python\n"):
            return "x + 0" if "x = " in text else f"x = {re.findall(r'user.([^?]*)[?]', text, re.DOTALL)[0]}\nx"
        found = re.findall(r"```output\n(.*)\n", text)
        result = found[-1] if found else "4"
        return f"So {result}. Alternatively, think on.\nBut no.\n</think>\n\\boxed{{{result}}}"

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        await asyncio.sleep(0)
        text = TOKENIZER.decode(list(prompt))
        self.prompts.append(text)
        said, ends = self.written(text), True
        if text.endswith("```python\n"):
            said, ends = f"{said}\n```\n", not sampling["stop"]
            if ends:  # nothing stops it
                said += self.written(text + said)
        ids = TOKENIZER.encode(said, add_special_tokens=False) + [TOKENIZER.eos_token_id] * ends
        cut = len(ids) > sampling["max_tokens"]
        ids = ids[: sampling["max_tokens"]]
        return Completion(
            tokens=np.array(ids, dtype=np.int32),
            logprobs=np.full(len(ids), -0.5, dtype=np.float32),
            versions=np.zeros(len(ids), dtype=np.int32),
            text=said,
            finish_reason="length" if cut else "stop" if ends else "stop_string",
        )


def correct(problem: Problem, response: str) -> float:
    return float(f"\\boxed{{{problem.answer}}}" in response)


class FakeFleet:
    """The real agent loop on the fake engine; as many rollouts at a time as are asked for."""

    def __init__(self, config: Config, engine: FakeEngine, tool: FakeInterpreter) -> None:
        self.config, self.engine = config, engine
        self.chat = Chat(TOKENIZER, [tool] if config.tools else [])
        self.closed = False

    async def act(
        self, problem: Problem, *, size: int, sampling: Any, group_id: str, prefix: Segments = ()
    ) -> RolloutGroup:
        found = await asyncio.gather(
            *(
                run_rollout(
                    problem,
                    engine=self.engine,
                    chat=self.chat,
                    rewards=[RewardTerm(name="right", weight=1.0, reward=correct)],
                    sampling=sampling,
                    max_model_tokens=2048,
                    rollout_id=f"{group_id}-{number}",
                    prefix=prefix,
                )
                for number in range(size)
            )
        )
        rollouts = tuple(rollout for rollout in found if rollout is not None)
        return RolloutGroup(
            problem=problem, rollouts=rollouts, dropped={"prompt_too_long": 1} if size > len(rollouts) else {}
        )

    async def isolation(self) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        self.closed = True


class Synthesis:
    """A sampler on fakes."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine | None = None) -> None:
        self.folder, self.engine, self.tool = tmp_path, engine or FakeEngine(), FakeInterpreter()
        TOKENIZER.save_pretrained(tmp_path / "model")
        (tmp_path / "run.yaml").write_text(CONFIG)

        class Start:
            @staticmethod
            async def start(config: Config, _: str) -> FakeFleet:
                self.fleet = FakeFleet(config, self.engine, self.tool)
                return self.fleet

        monkeypatch.setattr(rlsys.synthesis, "RolloutFleet", Start)

    def context(self, *overrides: str) -> SamplerContext:
        config = load_config(self.folder / "run.yaml", overrides)
        return SamplerContext(
            config=config,
            stage="traces",
            model=self.folder / "model",
            sampling=config.samples["traces"].sampling,
            tell=lambda _: None,
        )

    def sample(self, *problems: Problem, size: int = 1, overrides: Sequence[str] = (), **options: Any) -> list[Answers]:
        async def main() -> list[Answers]:
            sampler = ToolSynthesis(**options)
            await sampler.start(self.context(*overrides))
            try:
                return list(await asyncio.gather(*(sampler.sample(one, size=size) for one in problems)))
            finally:
                await sampler.close()

        return asyncio.run(main())

    def one(self, **options: Any) -> Sample:
        [answers] = self.sample(problem(), **options)
        [sample] = answers.samples
        return sample

    def run_stage(self, *overrides: str) -> tuple[Path, dict[str, Any]]:
        """The stage as a run has it; the samples file that it leaves, and its report."""
        config = load_config(self.folder / "run.yaml", [f"run_dir={self.folder / 'run'}", *overrides])

        async def main() -> None:
            directory = RunDirectory.open(config, resume=False, fresh=True)
            run = Run(config=config, directory=directory, console=Console(), stop=asyncio.Event())
            await stage_of(config, "traces")(run, self.folder / "model")

        asyncio.run(main())
        folder = self.folder / "run" / "traces"
        return folder / "samples.parquet", json.loads((folder / "report.json").read_text())

    def source(self, *texts: str, of: Problem | None = None) -> str:
        path = self.folder / "source.parquet"
        samples = [
            Sample(
                demonstration=Demonstration(problem=of or problem(), segments=((text, True),)),
                num_tokens=1,
                provenance={"model": "other"},
            )
            for text in texts
        ]
        write_samples(path, samples)
        return str(path)


@pytest.fixture
def synthesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Synthesis:
    return Synthesis(tmp_path, monkeypatch)


def test_a_block_is_put_where_the_thought_turns_run_and_reasoned_on(synthesis: Synthesis) -> None:
    sample = synthesis.one(max_blocks=1, hints=["I run it.\n```python\n"], split_words=["Wait"])
    assert sample.demonstration.segments == (
        ("<think>\nSo it is 4. I run it.\n```python\nx = 1 + 1\nx\n```\n", True),
        ("```output\n2\n```\n", False),
        ("So 2. Alternatively, think on.\nBut no.\n</think>\n\\boxed{2}", True),
    )
    assert sample.correct
    assert sample.finish_reason == "stop"
    assert sample.metrics["tool_calls"] == 1
    assert synthesis.fleet.closed


def test_what_is_put_in_trains_and_tool_output_does_not(synthesis: Synthesis) -> None:
    sample = synthesis.one(max_blocks=3)
    recorded = sample.demonstration.recorded
    assert recorded is not None
    trained = TOKENIZER.decode(recorded.tokens[recorded.loss_mask].tolist())
    assert trained == "".join(text for text, own in sample.demonstration.segments if own) + "<|im_end|>"
    assert "```output" not in trained
    assert all(entry["hint"] in trained for entry in sample.provenance["insertions"])
    assert sample.num_tokens == recorded.loss_mask.sum()


def blocks_of(samples: Sequence[Sample]) -> set[int]:
    return {len(sample.provenance["insertions"]) for sample in samples}


def test_a_later_block_stands_behind_the_earlier_ones_and_has_their_variables(synthesis: Synthesis) -> None:
    [answers] = synthesis.sample(problem(), size=12, insertions_per_trace=12)
    assert blocks_of(answers.samples) == {1, 2, 3}
    for sample in answers.samples:
        placed = sample.provenance["insertions"]
        assert [entry["position"] for entry in placed] == sorted({entry["position"] for entry in placed})
        assert sample.text.count("```python") == sample.text.count("```output") == len(placed)
        assert sample.metrics["tool_calls"] == sample.provenance["blocks"] == len(placed)
        assert sample.text.count("x + 0") == len(placed) - 1, "what needs the first block's variable ran without error"
        assert sample.correct
        for entry in placed:
            assert sample.text[entry["position"] :].startswith(entry["hint"])


def test_earlier_blocks_are_run_again_in_a_session_of_the_same_name(synthesis: Synthesis) -> None:
    [answers] = synthesis.sample(problem(), size=12, insertions_per_trace=12)
    sessions: dict[str, list[str]] = {}
    for name, last in synthesis.tool.calls:
        sessions.setdefault(name, []).append(last)
    one, two, three = ["x"], ["x", "x + 0"], ["x", "x + 0", "x + 0"]
    expected = {1: one, 2: one + two, 3: one + two + three}
    assert list(sessions.values()) == [expected[len(made.provenance["insertions"])] for made in answers.samples]


def test_without_execution_the_block_stands_there_and_the_model_goes_on(synthesis: Synthesis) -> None:
    sample = synthesis.one(execute=False, max_blocks=1, split_words=["Wait"], hints=["I run it.\n```python\n"])
    assert sample.text.startswith("<think>\nSo it is 4. I run it.\n```python\nx = 1 + 1\nx\n```\nSo 4. ")
    assert all(trained for _, trained in sample.demonstration.segments)
    assert (synthesis.tool.calls, sample.correct) == ([], False)
    assert (sample.provenance["executed"], sample.provenance["blocks"]) == (False, 1)
    assert synthesis.fleet.config.tools == []


def test_without_execution_there_may_be_several_blocks_too(synthesis: Synthesis) -> None:
    [answers] = synthesis.sample(problem(), size=12, insertions_per_trace=12, execute=False)
    assert blocks_of(answers.samples) == {1, 2, 3}
    assert all(sample.text.count("```python") == len(sample.provenance["insertions"]) for sample in answers.samples)


def test_every_sample_says_where_it_comes_from(synthesis: Synthesis) -> None:
    source = synthesis.source(TRACE)
    provenance = synthesis.one(source=source, max_blocks=1).provenance
    [entry] = provenance["insertions"]
    assert entry["hint"] in HINTS
    assert TRACE[entry["position"] :].startswith(entry["word"])
    assert provenance["sampler"] == "tool_synthesis"
    assert provenance["model"] == str(synthesis.folder / "model")
    assert (provenance["source"], provenance["trace_model"], provenance["trace"]) == (source, "other", 0)
    assert (provenance["executed"], provenance["blocks"], provenance["seed"]) == (True, 1, 7)


def test_the_same_seed_makes_the_same_samples_and_another_one_others(synthesis: Synthesis) -> None:
    def texts(**options: Any) -> list[str]:
        answers = synthesis.sample(problem(2), problem(3), size=4, insertions_per_trace=2, **options)
        return [sample.text for one in answers for sample in one.samples]

    assert texts() == texts()
    assert texts() != texts(overrides=["seed=8"])


def test_traces_of_a_source_are_used_in_turn_and_each_for_several_insertions(synthesis: Synthesis) -> None:
    source = synthesis.source("First. Wait, 1.", "Second. Wait, 2.", "Third. Wait, 3.")
    [answers] = synthesis.sample(problem(), source=source, size=5, insertions_per_trace=2, max_blocks=1)
    assert [sample.text.split(".")[0] for sample in answers.samples] == ["First", "First", "Second", "Second", "Third"]
    assert len({sample.text for sample in answers.samples}) == 5
    assert not any(prompt.endswith("assistant\n") for prompt in synthesis.engine.prompts), "no trace was sampled"


def test_the_model_is_asked_for_as_many_traces_as_are_needed(synthesis: Synthesis) -> None:
    synthesis.sample(problem(), size=5, insertions_per_trace=2, max_blocks=1)
    assert sum(prompt.endswith("assistant\n") for prompt in synthesis.engine.prompts) == 3


def test_what_makes_no_sample_is_counted_by_its_reason(synthesis: Synthesis) -> None:
    source = synthesis.source("No turn here.", "It turns. Wait.")
    first, second = synthesis.sample(problem(2), problem(3), source=source, size=3)
    assert (len(first.samples), dict(first.dropped)) == (1, {NO_PLACE: 1, NO_TRACE: 1})
    assert (list(second.samples), dict(second.dropped)) == ([], {NO_TRACE: 3})


def test_a_block_that_the_model_does_not_close_within_the_budget_makes_no_sample(synthesis: Synthesis) -> None:
    class Endless(FakeEngine):
        def written(self, text: str) -> str:
            return "1 + " * 2000 if text.endswith("```python\n") else super().written(text)

    for execute in (True, False):
        synthesis.engine = Endless()
        [answers] = synthesis.sample(problem(), execute=execute)
        assert (list(answers.samples), dict(answers.dropped)) == ([], {NOT_CLOSED: 1})


def test_a_prefix_that_leaves_no_room_makes_no_sample(synthesis: Synthesis) -> None:
    source = synthesis.source("Long. " * 400 + "Wait.")
    [answers] = synthesis.sample(problem(), source=source)
    assert dict(answers.dropped) == {NO_ROOM: 1}


class Eager(FakeEngine):
    """Writes blocks of its own behind every output."""

    def written(self, text: str) -> str:
        said = super().written(text)
        return "More.\n```python\n2\n```\n" * 3 + said if text.endswith("\n```\n") else said


def test_there_are_never_more_blocks_than_allowed(synthesis: Synthesis) -> None:
    synthesis.engine = Eager()
    [answers] = synthesis.sample(problem(), execute=False, max_blocks=2)
    assert (list(answers.samples), dict(answers.dropped)) == ([], {TOO_MANY: 1})


def test_where_a_later_block_fails_the_sample_with_the_earlier_ones_stays(synthesis: Synthesis) -> None:
    class OnlyOnce(FakeEngine):
        def written(self, text: str) -> str:
            return "1 + " * 2000 if text.endswith("```python\n") and "```output" in text else super().written(text)

    synthesis.engine = OnlyOnce()
    [answers] = synthesis.sample(problem(), size=12, insertions_per_trace=12)
    assert (len(answers.samples), dict(answers.dropped)) == (12, {})
    assert blocks_of(answers.samples) == {1}


def test_engines_work_on_other_problems_while_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(FakeEngine):
        overlaps = 0

        async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
            self.overlaps += synthesis.tool.in_flight
            others.set()
            return await super().generate(prompt, sampling=sampling)

    class Slow(FakeInterpreter):
        async def work(self, rollout_id: str) -> None:  # noqa: ARG002
            if self.in_flight == 1 and not waited:
                waited.append(True)
                others.clear()
                await asyncio.wait_for(others.wait(), timeout=20)  # until an engine is asked for something else

    engine, others, waited = Watched(), asyncio.Event(), list[bool]()
    synthesis = Synthesis(tmp_path, monkeypatch, engine)
    synthesis.tool = Slow()
    answers = synthesis.sample(*map(problem, range(2, 10)), size=2, insertions_per_trace=2)
    assert sum(len(one.samples) for one in answers) == 16
    assert waited == [True]
    assert engine.overlaps > 0


def test_as_a_stage_it_counts_what_it_skips_and_keeps_what_ends_correct(synthesis: Synthesis) -> None:
    problems = numbered(size=100)
    turns = [
        Sample(demonstration=Demonstration(problem=one, segments=((TRACE, True),)), num_tokens=1) for one in problems
    ]
    straight = [
        Sample(demonstration=Demonstration(problem=one, segments=(("No turn.", True),)), num_tokens=1)
        for one in problems[:60]
    ]
    write_samples(synthesis.folder / "source.parquet", [*straight[:60], *turns[70:]])
    path, report = synthesis.run_stage(
        "samples.traces.samples_per_problem=1",
        "samples.traces.sampler.use=rlsys.synthesis:ToolSynthesis",
        f"samples.traces.sampler.options.source={synthesis.folder / 'source.parquet'}",
        "samples.traces.filters=[{use: 'rlsys.filters:correct'}]",
    )
    samples = read_samples(path)
    assert sorted(sample.problem.id for sample in samples) == sorted(one.id for one in problems[70:])
    assert all(sample.correct and sample.provenance["blocks"] >= 1 for sample in samples)
    assert all(sample.demonstration.recorded is not None for sample in samples)
    assert {kind: about["answers"] for kind, about in report["dropped"].items()} == {
        "skipped_no_place": 60,
        "skipped_no_trace": 10,
    }


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hints": []}, "hints is empty"),
        ({"hints": ["run it"]}, r"hints: 'run it' must end in '```python\\n'"),
        ({"split_words": []}, r"split_words is \[\]"),
        ({"split_words": [""]}, r"split_words is \[''\]"),
        ({"split_at": "sentense"}, "split_at is 'sentense'; choose sentence, line, word"),
        ({"insertions_per_trace": 0}, "insertions_per_trace is 0"),
        ({"max_blocks": 0}, "max_blocks is 0"),
    ],
)
def test_options_that_cannot_be_meant_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ToolSynthesis(**options)


def test_a_misspelt_option_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean `max_blocks`"):
        check_options(ToolSynthesis, {"max_block": 2}, place="samples.tools.sampler")


@pytest.mark.parametrize("override", ["tools=[]", "chat.tool_format=template"])
def test_execution_needs_a_tool_that_is_called_by_fences(synthesis: Synthesis, override: str) -> None:
    with pytest.raises(ConfigError, match=r"samples\.traces\.sampler: execute=true runs .* or set execute: false"):
        synthesis.sample(problem(), overrides=[override])


@pytest.mark.parametrize("override", ["tools=[]", "chat.tool_format=template"])
def test_execution_without_such_a_tool_is_refused_before_anything_starts(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rlsys.run, "load_tokenizer", lambda _: None)
    path = Path(rlsys.run.__file__).parent / "configs" / "still3_tool_32b.yaml"
    rlsys.run.check(load_config(path))
    with pytest.raises(ConfigError, match=r"samples\.blocks\.sampler: execute=true runs .* or set execute: false"):
        rlsys.run.check(load_config(path, [override]))
    rlsys.run.check(load_config(path, [override, "samples.blocks.sampler.options.execute=false"]))
    rlsys.run.check(load_config(path, [override, "stages=[eval]"]))  # a stage that does not run needs no tool


def test_a_source_that_is_missing_empty_or_of_other_problems_is_an_error_that_names_it(synthesis: Synthesis) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        synthesis.sample(problem(), source=str(synthesis.folder / "nowhere.parquet"))
    with pytest.raises(DataError, match=r"source\.parquet: no sample is there to put code into"):
        synthesis.sample(problem(), source=synthesis.source())
    other = Problem(id="p2", prompt=({"role": "user", "content": "else?"},), answer="2")
    with pytest.raises(DataError, match=r"source\.parquet: problem 'p2' is another one there than in this run"):
        synthesis.sample(problem(), source=synthesis.source(TRACE, of=other))
