"""Hidden thoughts: asked for, told apart from the response, and never shown to anything that rewards."""

import asyncio
import dataclasses
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.actors.reward import RewardActor
from rlsys.chat import Chat
from rlsys.config import PoolConfig, RewardConfig, SamplingConfig
from rlsys.conversation import to_rollout
from rlsys.errors import ConfigError, DataError
from rlsys.interfaces import RewardResult
from rlsys.reproduce.hidden_thoughts import thought_demonstrations
from rlsys.reward_terms import RewardTerm, grade_group
from rlsys.rewards.judge import JudgeReward, PairwiseJudge, Verdict
from rlsys.rollout import mean_metrics, run_rollout
from rlsys.samples import sample_of
from rlsys.scratch import byte_tokenizer
from rlsys.thoughts import ThoughtConfig, Thoughts, shown, shown_group
from rlsys.types import Completion, Problem, Rollout, RolloutGroup

TOKENIZER = byte_tokenizer(max_length=4096)
CONFIG = ThoughtConfig(
    prompt="{message}\nWrite {thought_mark}, then {response_mark}", thought_mark="T:", response_mark="R:"
)
THOUGHTS = Thoughts(CONFIG)
CHAT = Chat(TOKENIZER, [], thoughts=THOUGHTS)
PROBLEM = Problem(
    id="p", prompt=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}), answer="2"
)
SECRET = "xyzzy-7f3a"


class FakeEngine:
    """Writes one text and ends the turn."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:  # noqa: ARG002
        await asyncio.sleep(0)
        ids = [*TOKENIZER.encode(self.texts.pop(0), add_special_tokens=False), TOKENIZER.eos_token_id]
        numbers = -(np.arange(len(ids), dtype=np.float32) + 1) / 100
        versions = np.zeros(len(ids), np.int32)
        return Completion(
            tokens=np.array(ids, np.int32), logprobs=numbers, versions=versions, text="", finish_reason="stop"
        )


def rollout_of(text: str, *terms: RewardTerm, chat: Chat = CHAT, problem: Problem = PROBLEM) -> Rollout:
    rollout = asyncio.run(
        run_rollout(
            problem,
            engine=FakeEngine(text),
            chat=chat,
            rewards=terms,
            sampling=SamplingConfig(max_response_tokens=4000),
            max_model_tokens=4096,
            rollout_id="r",
        )
    )
    assert rollout is not None
    return rollout


# --- the prompt ------------------------------------------------------------------------------------------------------


def test_the_last_message_of_the_user_asks_for_thoughts_and_the_problem_stays_as_it_was() -> None:
    text = TOKENIZER.decode(CHAT.render(PROBLEM))
    assert "user\n1 + 1?\nWrite T:, then R:<|im_end|>" in text
    assert "system\nBe brief.<|im_end|>" in text
    assert PROBLEM.prompt[1]["content"] == "1 + 1?"


@pytest.mark.parametrize("name", ["generic", "specific"])
def test_the_prompts_that_come_along_tell_the_marks_and_hold_the_message(name: str) -> None:
    config = ThoughtConfig(prompt=f"rlsys.thoughts:{name}")
    (message,) = Thoughts(config).instruct(Problem(id="p", prompt=({"role": "user", "content": "{braces} {message}"},)))
    assert message["content"].count("{braces} {message}") == 1
    assert all(message["content"].count(mark) == 1 for mark in config.marks)


def test_without_a_place_for_the_message_the_prompt_goes_behind_it() -> None:
    thoughts = Thoughts(ThoughtConfig(prompt="Use My thoughts: and My response:"))
    assert thoughts.instruct(PROBLEM)[1]["content"] == "1 + 1?\nUse My thoughts: and My response:"


def test_recorded_tokens_belong_to_one_thought_prompt() -> None:
    other = Chat(TOKENIZER, [], thoughts=Thoughts(dataclasses.replace(CONFIG, prompt=CONFIG.prompt + "!")))
    assert len({CHAT.fingerprint, other.fingerprint, Chat(TOKENIZER, []).fingerprint}) == 3


def test_a_problem_without_a_message_of_the_user_is_named() -> None:
    with pytest.raises(DataError, match="problem 'q' has no message of the user"):
        CHAT.render(Problem(id="q", prompt=({"role": "system", "content": "Be brief."},)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Think."}, "does not tell the policy to write 'My thoughts:'"),
        ({"prompt": "rlsys.thoughts:generik"}, "did you mean `rlsys.thoughts:generic`"),
        ({"prompt": "rlsys.thoughts:Thoughts"}, "name a text"),
        ({"response_mark": " "}, "response_mark is empty"),
        ({"thought_mark": ""}, "thought_mark is empty"),
        ({"thought_mark": "A", "response_mark": "A:"}, "contains the other"),
    ],
)
def test_a_prompt_or_marks_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Thoughts(ThoughtConfig(**settings))


# --- telling thought and response apart ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("T: hm R: 2", ("hm", "2")),
        ("\n T:R:2\n", ("", "2")),
        ("T: hm\n\nR:\n a\n b", ("hm", "a\n b")),
        ("hm R: 2", None),  # does not begin with its mark
        ("Sure! T: hm R: 2", None),
        ("T: hm", None),  # never comes to a response
        ("T: hm R: ", None),  # nothing behind it
        ("T: hm R: 2 R: 3", None),  # twice
        ("T: hm T: hm R: 2", None),
        ("T: hm R: 2 T: more", None),  # a thought inside the response
        ("R: 2 T: hm", None),  # the wrong way round
        ("", None),
    ],
)
def test_the_form_is_each_mark_once_the_thought_first(text: str, parts: tuple[str, str] | None) -> None:
    assert THOUGHTS.split(text) == parts


def test_without_a_thought_mark_the_thought_begins_at_once() -> None:
    thoughts = Thoughts(ThoughtConfig(prompt="{message} R:", thought_mark=None, response_mark="R:"))
    assert thoughts.split("hm R: 2") == ("hm", "2")
    assert thoughts.split("hm R: 2 R:") is None


@given(st.text(), st.text())
@settings(deadline=None)
def test_what_is_put_together_by_the_form_is_told_apart_again(thought: str, response: str) -> None:
    whole = f"T:{thought}R:{response}"
    found = THOUGHTS.split(whole)
    if whole.count("T:") == whole.count("R:") == 1 and response.strip():
        assert found == (thought.strip(), response.strip())
    else:
        assert found is None


@given(st.text(alphabet="abT:R é∑\n", max_size=40))
@settings(deadline=None)
def test_hidden_and_shown_tokens_are_all_tokens_and_no_shown_one_is_of_the_thought(text: str) -> None:
    tokens = np.array(TOKENIZER.encode(text, add_special_tokens=False), np.int32)
    zeros = np.zeros(len(tokens), np.float32)
    mask = np.ones(len(tokens), np.bool_)
    whole = Rollout(tokens=tokens, loss_mask=mask, logprobs=zeros, versions=tokens * 0, response=CHAT.decode(tokens))
    found = CHAT.hide_thought(whole)
    assert found.metrics["thought_tokens"] + found.metrics["shown_tokens"] == len(tokens)
    if found.response:
        seen = CHAT.decode(shown(found).tokens.tolist())
        assert seen.strip() == found.response
        assert "R:" not in seen
    else:
        assert len(shown(found)) == 0


# --- what rewards see ------------------------------------------------------------------------------------------------


def deep(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Everything that can be reached from a value: attributes, items, and the memory that an array is a view of."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    parts: list[Any] = []
    if isinstance(value, np.ndarray):
        parts = [value.base]
    elif isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
        parts = list(value)
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, name.name) for name in dataclasses.fields(value)]
    for part in parts:
        yield from deep(part, seen)


def reveals(*arguments: Any) -> bool:
    """Whether the secret can be read from arguments: as text, as tokens, or pickled; whole, or half of it."""
    needles = [SECRET, SECRET[:5], SECRET[5:]]
    for value in deep(arguments):
        if isinstance(value, str) and any(needle in value for needle in needles):
            return True
        if isinstance(value, np.ndarray) and value.dtype.kind == "i":
            text = TOKENIZER.decode(value.ravel().tolist())
            if any(needle in text for needle in needles):
                return True
    pickled = pickle.dumps(arguments)
    return any(needle.encode() in pickled for needle in needles)


SEEN: list[Any] = []


def a_function(*arguments: Any) -> float:
    SEEN.append(arguments)
    return 1.0


class AClass:
    async def score(self, *arguments: Any) -> RewardResult:
        SEEN.append(arguments)
        return RewardResult(score=1.0)


class AGroupReward:
    async def score_group(self, group: RolloutGroup) -> list[float]:
        SEEN.append(group)
        return [1.0] * len(group.rollouts)


def test_the_search_for_the_secret_would_find_it() -> None:
    rollout = rollout_of(f"T: {SECRET} R: 2")
    assert SECRET in rollout.transcript
    assert reveals(rollout)
    assert reveals(dataclasses.replace(rollout, transcript=""))
    assert reveals({"tokens": rollout.tokens[3:5]})  # a view of them all
    assert not reveals(shown(rollout))


@pytest.mark.parametrize("reward", [a_function, AClass(), AGroupReward()], ids=["function", "class", "group"])
def test_no_reward_gets_anything_in_which_the_thought_stands(reward: Any) -> None:
    SEEN.clear()
    terms = [RewardTerm(name="first", reward=a_function), RewardTerm(name="second", reward=reward)]
    rollouts = tuple(rollout_of(f"T: {SECRET} {number} R: {number}", *terms) for number in range(3))
    failed = rollout_of(f"T: {SECRET}", *terms)
    group = RolloutGroup(problem=PROBLEM, rollouts=(failed, *rollouts), dropped={f"tool_error: {SECRET}": 1})
    graded = asyncio.run(grade_group(group, terms, step=0))
    assert len(SEEN) == {True: 4, False: 6}[isinstance(reward, AGroupReward)]
    assert not reveals(SEEN)
    for rollout in graded.rollouts[1:]:
        assert rollout.reward == 2.0
        assert SECRET in rollout.transcript, "the record keeps it"
        assert SECRET in TOKENIZER.decode(rollout.tokens.tolist())
    assert graded.dropped == {f"tool_error: {SECRET}": 1}


def test_what_travels_to_a_reward_in_actors_of_its_own_has_no_thought() -> None:
    """The remote reward hands on what its term gives it; here the term of the actor, and the term of the rollout."""
    travelled: list[Any] = []

    class Remote:
        """As `RemoteReward`: pickles its arguments for another process."""

        async def score(self, *arguments: Any) -> RewardResult:
            travelled.append(pickle.dumps(arguments))
            return RewardResult(score=1.0)

    rollout_of(f"T: {SECRET} R: 2", RewardTerm(name="remote", reward=Remote()))
    assert len(travelled) == 1
    assert SECRET.encode() not in travelled[0]
    problem, response, rollout = pickle.loads(travelled[0])
    assert not reveals(problem, response, rollout)

    async def in_actor() -> None:
        SEEN.clear()
        config = RewardConfig(name="seen", use=f"{__name__}:a_function", actors=PoolConfig())
        actor = RewardActor(plug_in=config, place="rewards.0")
        actor._term = RewardTerm(name="seen", reward=AClass())
        await actor.open("session", "p")
        await actor.score("session", PROBLEM, rollout_of_unfinished)
        assert not reveals(SEEN), "also where somebody sends it a whole rollout"

    rollout_of_unfinished = rollout_of(f"T: {SECRET} R: 2")
    asyncio.run(in_actor())


class FakeJudge:
    """In the place of a judge's chat engine: keeps what it is asked and says yes."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked
        self.config = type("Config", (), {"max_model_tokens": 10_000})

    def count(self, text: str) -> int:
        return len(text)

    async def verdict(self, messages: Any, **options: Any) -> Verdict:
        self.asked.append((messages, options))
        return Verdict(probability=0.9, reasons="", num_reason_tokens=0, reached=True, cut=False)


@pytest.mark.parametrize("kind", [JudgeReward, PairwiseJudge])
def test_no_judge_is_asked_about_a_thought(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("rlsys.rewards.judge.ChatEngine", lambda **_: FakeJudge(asked))
    term = RewardTerm(name="judge", reward=kind(path="judge"))
    rollouts = tuple(rollout_of(f"T: {SECRET} {number} R: number {number}", term) for number in range(3))
    graded = asyncio.run(grade_group(RolloutGroup(problem=PROBLEM, rollouts=rollouts), [term], step=0))
    assert len(asked) == (3 if kind is JudgeReward else 6)
    assert not reveals(asked)
    assert "number 2" in str(asked)
    assert "Write T:, then R:" not in str(asked), "nor about the thought prompt"
    assert all(rollout.reward > 0 for rollout in graded.rollouts)


def test_what_is_shown_has_the_response_alone() -> None:
    rollout = rollout_of("T: a long thought R: the end", RewardTerm(name="one", reward=a_function))
    seen = shown(rollout)
    assert rollout.response == seen.response == seen.transcript == "the end"
    # The tokenizer has ": " as one token, which holds the end of the mark: it is not shown.
    assert CHAT.decode(seen.tokens.tolist()) == "the end"
    assert seen.loss_mask.all()
    assert len(seen) == len(seen.logprobs) == len(seen.versions) == rollout.metrics["shown_tokens"]
    assert set(seen.metrics) == {"correct", "status/one/ok", "tool_calls", "tool_errors"}
    assert seen.finish_reason == "stop"
    assert shown(seen) is seen


def test_without_thoughts_everything_is_shown() -> None:
    rollout = rollout_of("T: hm R: 2", chat=Chat(TOKENIZER, []))
    assert shown(rollout) is rollout
    assert rollout.response == "T: hm R: 2"
    group = RolloutGroup(problem=PROBLEM, rollouts=(rollout,), dropped={"tool_error: x": 1})
    assert shown_group(group) is group


# --- parse failures --------------------------------------------------------------------------------------------------


def always_right(problem: Problem, response: str) -> float:  # noqa: ARG001
    return 5.0


@pytest.mark.parametrize("text", ["2", "T: 2", "T: hm R: 2 T: 2", "T: R: "])
def test_a_parse_failure_is_never_correct_and_is_counted(text: str) -> None:
    rollout = rollout_of(text, RewardTerm(name="kind", reward=always_right))
    assert rollout.response == ""
    assert rollout.metrics["thought_parse_failure"] == 1
    assert rollout.metrics["correct"] == 0
    assert rollout.reward == 0
    assert rollout.loss_mask.sum() > 0, "it can train, as rejected"


def test_no_sibling_has_less_than_a_parse_failure() -> None:
    terms = [RewardTerm(name="minus", reward=lambda problem, response: -float(response))]  # noqa: ARG005
    texts = ("T: R: 3", "no form", "T: R: 7")
    group = RolloutGroup(problem=PROBLEM, rollouts=tuple(rollout_of(text, *terms) for text in texts))
    graded = asyncio.run(grade_group(group, terms, step=0))
    assert graded.rewards.tolist() == [-3.0, -7.0, -7.0]
    alone = RolloutGroup(problem=PROBLEM, rollouts=(group.rollouts[1],))
    assert asyncio.run(grade_group(alone, terms, step=0)).rewards.tolist() == [0.0]


def test_a_group_reward_that_fails_leaves_the_parse_failures() -> None:
    class Broken:
        def score_group(self, group: RolloutGroup) -> list[float]:  # noqa: ARG002
            raise OSError("no")

    terms = [RewardTerm(name="broken", reward=Broken())]
    rollouts = (rollout_of("T: R: 3"), rollout_of("no form"))
    graded = asyncio.run(grade_group(RolloutGroup(problem=PROBLEM, rollouts=rollouts), terms, step=0))
    assert [rollout.metrics["thought_parse_failure"] for rollout in graded.rollouts] == [1]
    assert sum(graded.dropped.values()) == 1


def test_means_say_how_long_thoughts_are_and_how_many_fail() -> None:
    rollouts = [rollout_of("T: hm R: 2"), rollout_of("no form")]
    means = mean_metrics(rollouts)
    assert means["thought_parse_failure"] == 0.5
    # T|: |h|m| |R|: | are 7 tokens, 2 and the end of turn two; "no form" and its end are 8, and nothing is shown.
    assert means["thought_tokens"] == 7.5
    assert means["shown_tokens"] == 1
    assert not [name for name in mean_metrics([rollout_of("2", chat=Chat(TOKENIZER, []))]) if "thought" in name]


def test_a_sample_keeps_thought_and_thought_prompt() -> None:
    rollout = rollout_of("T: hm R: 2")
    sample = sample_of(PROBLEM, rollout, CHAT, provenance={})
    assert sample.text == "T: hm R: 2"
    recorded = sample.demonstration.recorded
    assert recorded is not None
    assert "Write T:, then R:" in TOKENIZER.decode(recorded.tokens.tolist())
    assert recorded.loss_mask.sum() == rollout.loss_mask.sum()


# --- demonstrations of thoughts --------------------------------------------------------------------------------------

SUMS = [
    Problem(
        id=f"s{number}",
        prompt=({"role": "user", "content": f"{number} + 3 - 1 ="},),
        answer=str(number + 2),
        metadata={"expression": f"{number} + 3 - 1"},
    )
    for number in range(5)
]
THOUGHT = {"prompt": CONFIG.prompt, "thought_mark": "T:", "response_mark": "R:"}


def demonstrated(**shares: float) -> list[tuple[Problem, str, str]]:
    """(the problem without the demonstration's own prompt, prompt, answer)"""
    made = thought_demonstrations(SUMS, size=20, seed=0, thought=THOUGHT, shares=shares)
    by_id = {problem.id: problem for problem in SUMS}
    return [(by_id[one.problem.id], str(one.problem.prompt[-1]["content"]), one.text) for one in made]


@pytest.mark.parametrize("style", ["steps", "guess", "talk", "formless"])
def test_demonstrated_thoughts_follow_the_thought_prompt_and_all_but_one_kind_have_its_form(style: str) -> None:
    for problem, prompt, text in demonstrated(**{style: 1.0}):
        assert prompt == THOUGHTS.instruct(problem)[-1]["content"]
        parts = THOUGHTS.split(text)
        assert (parts is None) == (style == "formless")
        if parts is not None and style != "guess":
            assert parts[1] == f"\\boxed{{{problem.answer}}}"
        if parts is not None and style == "steps":
            first, second = parts[0].splitlines()
            number = int(str(problem.answer)) - 2
            assert (first, second) == (f"{number} + 3 = {number + 3}", f"{number + 3} - 1 = {number + 2}")


def test_answers_without_thoughts_have_the_plain_prompt_or_ask_for_the_steps() -> None:
    for problem, prompt, text in demonstrated(direct=1.0):
        assert (prompt, text) == (problem.prompt[0]["content"], f"\\boxed{{{problem.answer}}}")
    for problem, prompt, text in demonstrated(worked=1.0):
        assert prompt.startswith(problem.prompt[0]["content"])
        assert text.count("=") == 2
        assert text.endswith(f"\\boxed{{{problem.answer}}}")


def test_styles_come_in_their_shares_and_others_are_refused() -> None:
    made = thought_demonstrations(SUMS, size=2000, seed=1, thought=THOUGHT, shares={"direct": 0.75, "talk": 0.25})
    assert sum("T:" in one.text for one in made) / 2000 == pytest.approx(0.25, abs=0.03)
    for shares in ({"direct": 0.5}, {"direct": 0.5, "muse": 0.5}, {"direct": 1.5, "talk": -0.5}):
        with pytest.raises(ConfigError, match="must be of direct, worked, steps"):
            thought_demonstrations(SUMS, size=1, seed=1, thought=THOUGHT, shares=shares)


def test_the_thought_prompt_may_be_left_to_the_chat_of_the_run() -> None:
    same: dict[str, Any] = {"size": 20, "seed": 0, "thought": THOUGHT}
    asked = thought_demonstrations(SUMS, shares={"steps": 0.5, "guess": 0.5}, **same)
    left = thought_demonstrations(SUMS, shares={"steps": 0.5, "guess": 0.5}, ask=False, **same)
    assert [one.text for one in left] == [one.text for one in asked]
    assert all(one.problem in SUMS for one in left)
    chat = Chat(TOKENIZER, [], thoughts=THOUGHTS)
    plain = Chat(TOKENIZER, [])
    for one, other in zip(left, asked, strict=True):
        assert to_rollout(one, chat).tokens.tolist() == to_rollout(other, plain).tokens.tolist()
    with pytest.raises(ConfigError, match=r"leave out \['worked'\] of shares"):
        thought_demonstrations(SUMS, shares={"worked": 1.0}, ask=False, **same)
