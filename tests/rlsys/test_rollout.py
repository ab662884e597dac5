"""The agent loop with a scripted engine: what is trained on, what the budgets allow, how it is graded."""

import ast
import asyncio
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlsys.stages
from rlsys.chat import Chat
from rlsys.config import SamplingConfig
from rlsys.demonstrations import Segments
from rlsys.errors import ResourceError, RewardError, ToolError
from rlsys.interfaces import RewardResult, Session, ToolResult
from rlsys.reward_terms import RewardTerm
from rlsys.rollout import mean_metrics, run_rollout
from rlsys.scratch import byte_tokenizer
from rlsys.thinking_words import thinking_ratios
from rlsys.types import Completion, Problem, Rollout

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "1 + 1?"},), answer="2")
CALL = "I check.\n```python\n1 + 1\n```\n"


class FakeEngine:
    """Writes the scripted texts, one for each call, or ids where a script entry is a list; stops as a real one would.

    Log-probs count down from -0.001 over the whole rollout, versions are `version` and go up by one after each call.
    """

    def __init__(self, *script: str | list[int], version: int = 5) -> None:
        self.script = list(script)
        self.version = version
        self.prompts: list[list[int]] = []
        self.samplings: list[dict[str, Any]] = []
        self.written: list[list[int]] = []

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        await asyncio.sleep(0)
        self.prompts.append(list(prompt))
        self.samplings.append(dict(sampling))
        said = self.script.pop(0)
        ids = said if isinstance(said, list) else TOKENIZER.encode(said, add_special_tokens=False)
        ids = ids[: sampling["max_tokens"]]
        text = TOKENIZER.decode([token for token in ids if token != END])
        ends = ids[-1] == END
        stops = any(text.endswith(stop) for stop in sampling["stop"])
        already = sum(map(len, self.written))
        self.written.append(list(ids))
        self.version += 1
        return Completion(
            tokens=np.array(ids, dtype=np.int32),
            logprobs=-(np.arange(len(ids), dtype=np.float32) + already + 1) / 1000,
            versions=np.full(len(ids), self.version - 1, dtype=np.int32),
            text=text if sampling["stop"] else "",  # as the real one: it decodes only to look for stop strings
            finish_reason="stop" if ends else "stop_string" if stops else "length",
        )


class FakeTool:
    """Answers every call with the same text and keeps count of its sessions."""

    name, description = "python", "runs code"
    parameters: Mapping[str, Any] = {"type": "object"}

    def __init__(self, text: str = "2", *, error: Exception | None = None) -> None:
        self.text, self.error = text, error
        self.opened: list[str] = []
        self.closed = 0
        self.calls: list[Any] = []

    async def open(self, rollout_id: str) -> Session:
        self.opened.append(rollout_id)
        return self

    async def call(self, arguments: Mapping[str, Any]) -> ToolResult:
        self.calls.append(arguments["code"])
        if self.error is not None:
            raise self.error
        return ToolResult(text=self.text, ok="rror" not in self.text)

    async def close(self) -> None:
        self.closed += 1


def zero(problem: Problem, response: str) -> float:  # noqa: ARG001
    return 0.0


def run(
    engine: FakeEngine,
    *,
    tool: FakeTool | None = None,
    reward: Any = zero,
    max_model_tokens: int = 512,
    tool_format: str = "fenced",
    prefix: Segments = (),
    **sampling: Any,
) -> Rollout | None:
    chat = Chat(TOKENIZER, [] if tool is None else [tool], tool_format=tool_format)
    terms = reward if isinstance(reward, list) else [RewardTerm(name="reward", weight=1.0, reward=reward)]
    return asyncio.run(
        run_rollout(
            PROBLEM,
            engine=engine,
            chat=chat,
            rewards=terms,
            sampling=SamplingConfig(**sampling),
            max_model_tokens=max_model_tokens,
            rollout_id="group-0",
            prefix=prefix,
        )
    )


def finished(rollout: Rollout | None) -> Rollout:
    assert rollout is not None
    return rollout


PROMPT = Chat(TOKENIZER, []).render(PROBLEM)
OUTPUT = TOKENIZER.encode("```output\n2\n```\n", add_special_tokens=False)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_the_ids_that_train_are_those_that_were_generated() -> None:
    # "the" spelt byte by byte and " the" as one word: re-encoding the text would give other ids.
    spelt = [*(TOKENIZER.encode(letter, add_special_tokens=False)[0] for letter in " the"), END]
    assert TOKENIZER.encode(TOKENIZER.decode(spelt[:-1]), add_special_tokens=False) != spelt[:-1]
    rollout = finished(run(FakeEngine(spelt)))
    assert rollout.tokens[rollout.loss_mask].tolist() == spelt
    assert rollout.response == " the"


def test_prompt_calls_and_output_lie_on_one_axis_and_only_what_was_written_trains() -> None:
    engine, tool = FakeEngine(CALL, "So \\boxed{2}<|im_end|>"), FakeTool()
    rollout = finished(run(engine, tool=tool))
    first, second = engine.written
    assert rollout.tokens.tolist() == [*PROMPT, *first, *OUTPUT, *second]
    assert rollout.loss_mask.tolist() == [
        *[False] * len(PROMPT),
        *[True] * len(first),
        *[False] * len(OUTPUT),
        *[True] * len(second),
    ]
    assert tool.calls == ["1 + 1"]
    assert rollout.finish_reason == "stop"
    assert rollout.response == CALL + "So \\boxed{2}"
    assert rollout.transcript == TOKENIZER.decode(rollout.tokens.tolist())
    assert rollout.metrics["tool_calls"] == 1
    assert rollout.metrics["tool_errors"] == 0


def test_what_was_not_generated_has_version_minus_one_and_log_prob_zero() -> None:
    engine = FakeEngine(CALL, "\\boxed{2}<|im_end|>")
    rollout = finished(run(engine, tool=FakeTool()))
    read = ~rollout.loss_mask
    assert set(rollout.versions[read].tolist()) == {-1}
    assert not rollout.logprobs[read].any()
    assert (rollout.logprobs[rollout.loss_mask] < 0).all()


def test_every_token_keeps_its_own_log_prob_and_version() -> None:
    engine = FakeEngine(CALL, "\\boxed{2}<|im_end|>", version=7)
    rollout = finished(run(engine, tool=FakeTool()))
    first, second = map(len, engine.written)
    mine = rollout.loss_mask
    assert rollout.versions[mine].tolist() == [7] * first + [8] * second
    assert rollout.logprobs[mine] == pytest.approx([-(k + 1) / 1000 for k in range(first + second)])
    assert rollout.first_version == 7


def test_the_next_call_of_the_engine_sees_exactly_the_tokens_so_far() -> None:
    engine = FakeEngine(CALL, CALL, "done<|im_end|>")
    rollout = finished(run(engine, tool=FakeTool()))
    for prompt in engine.prompts:
        assert prompt == rollout.tokens[: len(prompt)].tolist()
    assert engine.prompts[0] == PROMPT
    assert engine.prompts[1] == [*PROMPT, *engine.written[0], *OUTPUT]


# --- turns -----------------------------------------------------------------------------------------------------------


def test_a_stop_string_that_is_no_call_goes_on_with_the_same_turn() -> None:
    engine = FakeEngine("```text\nplan\n```\n", "```python\n1 + 1\n```\n", "done<|im_end|>")
    tool = FakeTool()
    rollout = finished(run(engine, tool=tool))
    assert tool.calls == ["1 + 1"]
    assert rollout.finish_reason == "stop"
    assert rollout.tokens[rollout.loss_mask].tolist() == list(itertools.chain(*engine.written))


def test_output_that_looks_like_a_call_is_not_called() -> None:
    engine = FakeEngine(CALL, "\n```\n", "end<|im_end|>")
    tool = FakeTool("```python\nimport os")
    rollout = finished(run(engine, tool=tool))
    assert tool.calls == ["1 + 1"]
    assert rollout.finish_reason == "stop"


def test_a_session_is_opened_by_the_first_call_kept_for_the_next_and_closed_at_the_end() -> None:
    tool = FakeTool()
    run(FakeEngine(CALL, CALL, "done<|im_end|>"), tool=tool)
    assert (tool.opened, tool.closed, len(tool.calls)) == (["group-0"], 1, 2)


def test_without_a_call_no_session_is_opened() -> None:
    tool = FakeTool()
    run(FakeEngine("2<|im_end|>"), tool=tool)
    assert (tool.opened, tool.closed) == ([], 0)


def test_sessions_are_closed_where_the_tool_or_the_engine_fails() -> None:
    tool = FakeTool(error=RuntimeError("the host has no user namespaces"))
    with pytest.raises(ToolError, match="tool 'python' raised RuntimeError: the host has no user namespaces"):
        run(FakeEngine(CALL, "done<|im_end|>"), tool=tool)
    assert (len(tool.opened), tool.closed) == (1, 1)
    tool = FakeTool()
    with pytest.raises(IndexError):
        run(FakeEngine(CALL), tool=tool)
    assert (len(tool.opened), tool.closed) == (1, 1)


def test_an_error_that_the_user_can_put_right_is_no_failure_of_one_rollout() -> None:
    with pytest.raises(ResourceError, match="the account is empty"):
        run(FakeEngine(CALL), tool=FakeTool(error=ResourceError("the account is empty")))


class StuckTool(FakeTool):
    async def close(self) -> None:
        raise OSError("device busy")


def test_a_session_that_cannot_be_closed_fails_the_rollout_but_hides_no_other_error() -> None:
    with pytest.raises(ToolError, match="tool 'python' raised OSError: device busy"):
        run(FakeEngine(CALL, "done<|im_end|>"), tool=StuckTool())
    with pytest.raises(IndexError):  # the engine's
        run(FakeEngine(CALL), tool=StuckTool())


def test_sessions_are_closed_where_the_rollout_is_cancelled() -> None:
    tool = FakeTool()
    waiting = asyncio.Event()

    class Hanging(FakeEngine):
        async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
            if not self.script:
                waiting.set()
                await asyncio.Event().wait()
            return await super().generate(prompt, sampling=sampling)

    async def main() -> None:
        chat = Chat(TOKENIZER, [tool])
        sampling = SamplingConfig()
        task = asyncio.create_task(
            run_rollout(
                PROBLEM,
                engine=Hanging(CALL),
                chat=chat,
                rewards=[],
                sampling=sampling,
                max_model_tokens=512,
                rollout_id="r",
            )
        )
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (len(tool.opened), tool.closed) == (1, 1)


def test_a_call_of_a_tool_that_is_not_there_is_read_as_an_error() -> None:
    other = FakeTool()
    other.name = "search"
    call = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
    engine = FakeEngine(f"{call}<|im_end|>", "sorry<|im_end|>")
    rollout = finished(run(engine, tool=other, tool_format="template"))
    assert "There is no tool 'python'. Tools: search." in rollout.transcript
    assert (rollout.metrics["tool_calls"], rollout.metrics["tool_errors"], other.opened) == (1, 1, [])


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_the_budget_of_tokens_holds_for_generated_text() -> None:
    engine = FakeEngine("a" * 400 + "<|im_end|>")
    rollout = finished(run(engine, max_response_tokens=40))
    assert len(rollout) == len(PROMPT) + 40
    assert rollout.finish_reason == "length"
    assert engine.samplings[0]["max_tokens"] == 40


def test_the_budget_of_tokens_holds_for_tool_output() -> None:
    engine = FakeEngine(CALL, "never<|im_end|>")
    rollout = finished(run(engine, tool=FakeTool("9" * 1000), max_response_tokens=60))
    assert len(rollout) == len(PROMPT) + 60
    assert rollout.num_trained_tokens == len(engine.written[0])
    assert rollout.finish_reason == "length"
    assert len(engine.prompts) == 1


def test_the_budget_is_what_is_left_after_each_turn() -> None:
    engine = FakeEngine(CALL, "done<|im_end|>")
    run(engine, tool=FakeTool(), max_response_tokens=100)
    assert engine.samplings[1]["max_tokens"] == 100 - len(engine.written[0]) - len(OUTPUT)


def test_the_context_limits_the_budget() -> None:
    engine = FakeEngine("a" * 400)
    rollout = finished(run(engine, max_response_tokens=200, max_model_tokens=len(PROMPT) + 7))
    assert len(rollout) == len(PROMPT) + 7


def test_a_stop_string_at_the_very_end_of_the_budget_ends_the_rollout() -> None:
    ids = TOKENIZER.encode("```text\nplan\n```\n", add_special_tokens=False)
    rollout = finished(run(FakeEngine(ids), tool=FakeTool(), max_response_tokens=len(ids)))
    assert rollout.finish_reason == "length"


def test_a_prompt_that_leaves_no_room_gives_none() -> None:
    engine = FakeEngine("a<|im_end|>")
    assert run(engine, max_model_tokens=len(PROMPT)) is None
    assert run(engine, max_model_tokens=len(PROMPT) - 5) is None
    assert not engine.prompts
    assert run(engine, max_model_tokens=len(PROMPT) + 1) is not None


def test_the_budget_of_tool_calls_holds() -> None:
    tool = FakeTool()
    engine = FakeEngine(*[CALL] * 10)
    rollout = finished(run(engine, tool=tool, max_tool_calls=3, max_response_tokens=400))
    assert len(tool.calls) == 3
    assert rollout.finish_reason == "turns"
    assert rollout.loss_mask[-1], "the call that was not answered is the end"
    assert len(engine.prompts) == 4


def test_the_engine_is_given_the_sampling_and_where_to_stop() -> None:
    engine = FakeEngine("a<|im_end|>")
    run(engine, tool=FakeTool(), temperature=0.7, top_p=0.9)
    assert engine.samplings[0] == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 256, "stop": ["\n```\n"]}


# --- template tools --------------------------------------------------------------------------------------------------


def test_template_calls_are_answered_between_turns() -> None:
    said = '<tool_call>{"name": "python", "arguments": {"code": "1 + 1"}}</tool_call>'
    engine = FakeEngine(f"{said}<|im_end|>", "2<|im_end|>")
    tool = FakeTool()
    rollout = finished(run(engine, tool=tool, tool_format="template"))
    assert tool.calls == ["1 + 1"]
    assert rollout.transcript.endswith(
        f"assistant\n{said}<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    )
    assert rollout.tokens[rollout.loss_mask].tolist() == list(itertools.chain(*engine.written))


def test_several_calls_in_one_turn_count_against_the_budget_together() -> None:
    said = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>' * 3
    tool = FakeTool()
    rollout = finished(run(FakeEngine(f"{said}<|im_end|>"), tool=tool, tool_format="template", max_tool_calls=2))
    assert (rollout.finish_reason, tool.calls) == ("turns", [])


# --- a turn that was begun ------------------------------------------------------------------------------------------

HINT = "<think>\nSo it is 3. Let me check.\n```python\n"
BEGUN: Segments = ((CALL, True), ("```output\n2\n```\n", False), ("Again.\n```python\n", True))


def encoded(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def test_a_fence_that_the_prefix_leaves_open_is_closed_by_the_policy_and_its_code_is_run() -> None:
    engine, tool = FakeEngine("1 + 1\n```\n", "\\boxed{2}<|im_end|>"), FakeTool()
    seen: list[str] = []

    def look(problem: Problem, response: str) -> float:  # noqa: ARG001
        seen.append(response)
        return 0.0

    rollout = finished(run(engine, tool=tool, reward=look, prefix=((HINT, True),)))
    assert tool.calls == ["1 + 1"]
    assert engine.prompts[0] == [*PROMPT, *encoded(HINT)]
    first, second = engine.written
    assert rollout.tokens.tolist() == [*PROMPT, *encoded(HINT), *first, *OUTPUT, *second]
    assert seen == [rollout.response] == [HINT + "1 + 1\n```\n\\boxed{2}"]


def test_trained_segments_of_a_prefix_train_without_a_log_prob_or_a_version_and_others_do_not() -> None:
    engine = FakeEngine("1\n```\n", "\\boxed{2}<|im_end|>")
    rollout = finished(run(engine, tool=FakeTool(), prefix=BEGUN))
    begun = [token for text, _ in BEGUN for token in encoded(text)]
    mask = [trained for text, trained in BEGUN for _ in encoded(text)]
    behind = slice(len(PROMPT), len(PROMPT) + len(begun))
    assert rollout.tokens[behind].tolist() == begun
    assert rollout.loss_mask[behind].tolist() == mask
    assert set(rollout.versions[behind].tolist()) == {-1}
    assert not rollout.logprobs[behind].any()
    assert rollout.first_version == -1, "no step of RL takes it: it counts as older than any weights"
    assert rollout.response == CALL + "Again.\n```python\n1\n```\n\\boxed{2}"
    assert rollout.num_trained_tokens == sum(mask) + sum(map(len, engine.written))


def test_calls_of_a_prefix_are_made_again_in_the_session_of_the_rollout_and_counted() -> None:
    engine, tool = FakeEngine("1\n```\n", "\\boxed{2}<|im_end|>"), FakeTool()
    rollout = finished(run(engine, tool=tool, prefix=BEGUN))
    assert tool.calls == ["1 + 1", "1"]
    assert (tool.opened, tool.closed) == (["group-0"], 1)
    assert rollout.metrics["tool_calls"] == 2
    assert len(engine.prompts) == 2, "the engine is asked for nothing that stands there"


def test_calls_of_a_prefix_count_in_the_budget_of_calls() -> None:
    tool = FakeTool()
    rollout = finished(run(FakeEngine("1\n```\n"), tool=tool, prefix=BEGUN, max_tool_calls=1))
    assert (rollout.finish_reason, tool.calls) == ("turns", ["1 + 1"])


def test_a_call_that_answers_otherwise_than_the_prefix_says_is_an_error_of_the_tool() -> None:
    tool = FakeTool("3")
    with pytest.raises(ToolError, match=r"'python' did not answer again what stands in the prefix .*output\\n2"):
        run(FakeEngine("1\n```\n"), tool=tool, prefix=BEGUN)
    assert tool.closed == 1


def test_calls_of_a_prefix_in_the_template_s_form_are_made_again_too() -> None:
    said = '<tool_call>{"name": "python", "arguments": {"code": "1 + 1"}}</tool_call><|im_end|>'
    tool = FakeTool()
    result = "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    prefix = ((said, True), (result, False), ("So", True))
    rollout = finished(run(FakeEngine(" 2<|im_end|>"), tool=tool, tool_format="template", prefix=prefix))
    assert tool.calls == ["1 + 1"]
    assert rollout.transcript.endswith(said + result + "So 2<|im_end|>")


def test_without_tools_a_block_in_the_prefix_is_text() -> None:
    rollout = finished(run(FakeEngine("1 + 1\n```\n\\boxed{2}<|im_end|>"), prefix=((HINT, True),)))
    assert rollout.loss_mask[len(PROMPT) :].all()
    assert rollout.metrics["tool_calls"] == 0


def test_a_prefix_counts_in_the_budget_of_tokens() -> None:
    length = len(encoded(HINT))
    engine = FakeEngine("a" * 100)
    rollout = finished(run(engine, prefix=((HINT, True),), max_response_tokens=length + 7))
    assert len(rollout) == len(PROMPT) + length + 7
    assert engine.samplings[0]["max_tokens"] == 7
    assert rollout.finish_reason == "length"


def test_a_prefix_that_leaves_no_room_gives_none_and_asks_neither_engine_nor_tool() -> None:
    begun = sum(len(encoded(text)) for text, _ in BEGUN)
    engine, tool = FakeEngine("a<|im_end|>"), FakeTool()
    assert run(engine, tool=tool, prefix=BEGUN, max_response_tokens=begun) is None
    assert run(engine, tool=tool, prefix=BEGUN, max_model_tokens=len(PROMPT) + begun) is None
    assert (engine.prompts, tool.calls) == ([], [])
    assert run(engine, tool=tool, prefix=BEGUN, max_response_tokens=begun + 1) is not None


def test_no_stage_that_learns_or_measures_gives_a_prefix() -> None:
    folder = Path(rlsys.stages.__file__).parent
    calls = [
        (path.name, node.lineno)
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "prefix"
    ]
    assert calls == [], "what nobody generated has no log-probs to compare with"


# --- rewards ---------------------------------------------------------------------------------------------------------


async def slowly(problem: Problem, response: str) -> float:
    await asyncio.sleep(0)
    return float(response == problem.answer)


class ByTokens:
    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:
        assert problem is PROBLEM
        return RewardResult(score=rollout.num_trained_tokens, terms={"length": float(len(response))})


class Synchronous:
    def score(self, problem: Problem, response: str, rollout: Rollout) -> bool:  # noqa: ARG002
        return response == "2"


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (lambda problem, response: float(response == problem.answer), 1.0),
        (slowly, 1.0),
        (ByTokens(), 2.0),
        (Synchronous(), 1.0),
        (zero, 0.0),
    ],
)
def test_functions_coroutines_and_objects_are_accepted_as_rewards(reward: Any, expected: float) -> None:
    rollout = finished(run(FakeEngine("2<|im_end|>"), reward=reward))
    assert rollout.reward == expected
    assert rollout.reward_terms["reward"] == expected


def test_terms_are_weighted_summed_and_kept_one_by_one() -> None:
    terms = [
        RewardTerm(name="right", weight=1.0, reward=slowly),
        RewardTerm(name="tokens", weight=-0.25, reward=ByTokens()),
    ]
    rollout = finished(run(FakeEngine("2<|im_end|>"), reward=terms))
    # "2" and the end of turn: 1 - 0.25 * 2
    assert rollout.reward == 0.5
    assert rollout.reward_terms == {"right": 1.0, "tokens": 2.0, "tokens/length": 1.0}
    assert rollout.metrics["correct"] == 1.0
    assert rollout.metrics["status/right/ok"] == 1.0


@pytest.mark.parametrize(("status", "score", "correct"), [("correct", 0.1, 1.0), ("wrong", 0.5, 0.0), ("ok", 0.5, 1.0)])
def test_the_status_of_the_first_term_says_what_is_correct(status: str, score: float, correct: float) -> None:
    rollout = finished(run(FakeEngine("2<|im_end|>"), reward=lambda *_: RewardResult(score=score, status=status)))
    assert rollout.metrics["correct"] == correct


def test_the_reward_reads_what_the_policy_wrote_and_no_tool_output() -> None:
    seen: list[str] = []

    def look(problem: Problem, response: str) -> float:  # noqa: ARG001
        seen.append(response)
        return 0.0

    run(FakeEngine(CALL, "end<|im_end|>"), tool=FakeTool("\\boxed{2}"), reward=look)
    assert seen == [CALL + "end"]


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (lambda *_: 1 / 0, "reward 'reward' raised ZeroDivisionError"),
        (lambda *_: None, r"reward 'reward' gave None \(NoneType\) as a score"),
        (lambda _: 1.0, "reward 'reward' raised TypeError"),
        (lambda *_: math.nan, r"gave nan \(float\) as a score; give a finite number"),
        (lambda *_: RewardResult(score=math.inf), r"gave inf \(float\) as a score; give a finite number"),
    ],
)
def test_a_reward_that_fails_is_an_error_and_never_a_zero(reward: Any, says: str) -> None:
    tool = FakeTool()
    with pytest.raises(RewardError, match=says):
        run(FakeEngine(CALL, "2<|im_end|>"), tool=tool, reward=reward)
    assert tool.closed == 1


def test_log_probs_that_are_not_finite_are_counted_and_stand_as_0() -> None:
    class Failing(FakeEngine):
        async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
            completion = await super().generate(prompt, sampling=sampling)
            completion.logprobs[[0, 2]] = [np.nan, -np.inf]
            return completion

    rollout = finished(run(Failing("2 it is<|im_end|>"), reward=lambda *_: 1.0))
    written = rollout.logprobs[rollout.loss_mask]
    assert written[[0, 1, 2]].tolist() == pytest.approx([0.0, -0.002, 0.0])
    assert (rollout.metrics["not_finite"], rollout.reward) == (2.0, 1.0)
    assert "not_finite" not in finished(run(FakeEngine("2<|im_end|>"))).metrics


# --- means -----------------------------------------------------------------------------------------------------------


def test_means_of_a_batch_worked_by_hand() -> None:
    def rollout(trained: int, reward: float, finish: Any, calls: float, errors: float) -> Rollout:
        return Rollout(
            tokens=np.zeros(4, dtype=np.int32),
            loss_mask=np.arange(4) >= 4 - trained,
            logprobs=np.zeros(4, dtype=np.float32),
            versions=np.zeros(4, dtype=np.int32),
            reward=reward,
            reward_terms={"right": reward},
            finish_reason=finish,
            metrics={"tool_calls": calls, "tool_errors": errors, "correct": reward, f"status/right/{finish}": 1.0},
        )

    found = mean_metrics(
        [rollout(3, 1.0, "stop", 3, 1), rollout(1, 0.0, "length", 0, 0), rollout(2, 1.0, "stop", 1, 1)]
    )
    assert found["reward"] == found["accuracy"] == found["reward/right"] == pytest.approx(2 / 3)
    assert found["response_tokens"] == 2
    assert found["completed_ratio"] == found["tool_rate"] == pytest.approx(2 / 3)
    assert found["tool_calls"] == pytest.approx(4 / 3)
    assert found["tool_error_rate"] == 0.5
    assert found["status/right/length"] == pytest.approx(1 / 3)
    assert mean_metrics([]) == {}


def test_the_share_of_responses_that_verify_reflect_or_correct_is_counted() -> None:
    responses = ["Wait, I verify that.", "I confirmed it. Double-check!", "It is incorrect.", "HOWEVER: adjusting"]
    assert thinking_ratios(responses) == {"words/verification": 0.5, "words/reflection": 0.5, "words/correction": 0.25}
    assert thinking_ratios([]) == {}
    rollout = finished(run(FakeEngine("Wait<|im_end|>")))
    found = mean_metrics([rollout])
    assert (found["words/verification"], found["words/reflection"], found["words/correction"]) == (0.0, 1.0, 0.0)
