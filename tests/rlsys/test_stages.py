"""Data on its way to the learner: problems in order for ever, demonstrations as rollouts, batches."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.chat import Chat
from rlsys.curriculum import endless
from rlsys.demonstrations import Demonstration, arithmetic_demonstrations
from rlsys.scratch import byte_tokenizer
from rlsys.stages.common import assemble
from rlsys.stages.offline import to_rollout
from rlsys.types import Problem, Rollout

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TOKENIZER = byte_tokenizer()
CHAT = Chat(TOKENIZER, [])
PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "1 + 1?"},), answer="2", metadata={"expression": "1 + 1"})


def first(count: int, items: list[int], *, seed: int = 0, skip: int = 0) -> list[int]:
    return list(itertools.islice(endless(items, seed=seed, skip=skip), count))


@PATIENT
@given(st.integers(1, 20), st.integers(0, 5), st.integers(0, 70), st.integers(0, 40))
def test_an_endless_stream_resumes_exactly_where_it_was(size: int, seed: int, skip: int, more: int) -> None:
    items = list(range(size))
    assert first(more, items, seed=seed, skip=skip) == first(skip + more, items, seed=seed)[skip:]


@PATIENT
@given(st.integers(1, 20), st.integers(0, 5))
def test_every_epoch_has_every_item_once(size: int, seed: int) -> None:
    items = list(range(size))
    found = first(3 * size, items, seed=seed)
    for epoch in range(3):
        assert sorted(found[epoch * size : (epoch + 1) * size]) == items


def test_epochs_and_seeds_have_different_orders() -> None:
    items = list(range(50))
    found = first(100, items)
    assert found[:50] != found[50:]
    assert found[:50] != first(50, items, seed=1)
    assert found[:50] != items


def test_exactly_the_trained_segments_and_the_end_of_turn_train() -> None:
    segments = (("Let me check", True), ("```output\n2\n```\n", False), ("\\boxed{2}", True))
    rollout = to_rollout(Demonstration(problem=PROBLEM, segments=segments), CHAT)
    prompt = CHAT.render(PROBLEM)
    first_part, output, last_part = (CHAT.encode(text) for text, _ in segments)
    assert rollout.tokens.tolist() == [*prompt, *first_part, *output, *last_part, TOKENIZER.eos_token_id]
    assert rollout.loss_mask.tolist() == [
        *[False] * len(prompt),
        *[True] * len(first_part),
        *[False] * len(output),
        *[True] * (len(last_part) + 1),
    ]
    assert not rollout.logprobs.any()
    assert set(rollout.versions.tolist()) == {-1}


def test_a_demonstration_reads_as_the_template_would_render_it() -> None:
    for demonstration in arithmetic_demonstrations([PROBLEM], size=6, seed=0):
        rollout = to_rollout(demonstration, CHAT)
        turn = {"role": "assistant", "content": demonstration.text}
        whole = TOKENIZER.apply_chat_template([*PROBLEM.prompt, turn], tokenize=False)
        assert TOKENIZER.decode(rollout.tokens.tolist()) + "\n" == whole


def test_a_batch_has_one_advantage_for_all_tokens_of_a_rollout_and_counts_those_that_train() -> None:
    short = to_rollout(Demonstration(problem=PROBLEM, segments=(("a", True),)), CHAT)
    longer = to_rollout(Demonstration(problem=PROBLEM, segments=(("abc", True), ("d", False))), CHAT)
    batch = assemble([short, longer], [0.5, -2.0])
    assert [set(advantage.tolist()) for advantage in batch.advantages] == [{0.5}, {-2.0}]
    assert [len(advantage) for advantage in batch.advantages] == [len(short), len(longer)]
    assert batch.advantages[0].dtype == np.float32
    # "a" and the end of turn, "abc" and the end of turn
    assert batch.num_tokens == 2 + 4


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", [1.0, 1.0]),
        # 2 and 4 tokens, 6 in all: weight * length / 6 must be 1/2 for either, so 6 / (2 * length).
        ("sequence", [1.5, 0.75]),
        # Each sum over 10, then the mean over two rollouts: 6 / (2 * 10).
        ("constant", [0.3, 0.3]),
    ],
)
def test_aggregation_is_a_weight_for_the_tokens_of_each_rollout(aggregation: Any, expected: list[float]) -> None:
    short = to_rollout(Demonstration(problem=PROBLEM, segments=(("a", True),)), CHAT)
    longer = to_rollout(Demonstration(problem=PROBLEM, segments=(("abc", True), ("d", False))), CHAT)
    batch = assemble([short, longer], [0.5, -2.0], aggregation=aggregation, constant=10)
    assert batch.weights == pytest.approx(expected)


def test_a_batch_in_which_nothing_trains_is_refused() -> None:
    silent = Rollout(
        tokens=np.zeros(2, np.int32),
        loss_mask=np.zeros(2, np.bool_),
        logprobs=np.zeros(2, np.float32),
        versions=np.zeros(2, np.int32),
    )
    with pytest.raises(ValueError, match="without a single trained token"):
        assemble([silent], [1.0])
