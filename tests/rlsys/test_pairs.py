"""Pairs on the learner: losses over sequences spread over tokens, with numbers worked by hand."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys import preference
from rlsys.errors import DataError
from rlsys.losses import LossInputs
from rlsys.packing import MicroBatch, shard
from rlsys.pair_data import arithmetic_pairs, table_pairs
from rlsys.pair_tokens import mismatched
from rlsys.pairs import (
    PreferencePair,
    labelled_batch,
    over_labelled,
    over_pairs,
    over_scored_pairs,
    pair_batch,
    with_end,
    with_logprobs,
)
from rlsys.types import Problem, Rollout, TrainBatch

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "1 + 1?"},), answer="2", metadata={"expression": "1 + 1"})


def answer(prompt: int, length: int, reference: float = 0.0) -> Rollout:
    """A prompt of three tokens of one kind and so many trained ones, whose tokens tell their places."""
    tokens = np.concatenate([np.full(3, prompt), np.arange(length)]).astype(np.int32)
    mask = np.arange(3 + length) >= 3
    logprobs = np.where(mask, reference, 0).astype(np.float32)
    return Rollout(tokens=tokens, loss_mask=mask, logprobs=logprobs, versions=np.full(3 + length, -1, np.int32))


def inputs_of(micro: MicroBatch, logprobs: Tensor, **options: Any) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        rollout_logprobs=torch.from_numpy(micro.rollout_logprobs),
        advantages=torch.from_numpy(micro.advantages),
        sequences=torch.from_numpy(micro.sequences),
        weights=torch.from_numpy(micro.weights),
        **options,
    )


def totals(batch: TrainBatch, loss: Any, score: Any, *, budget: int, **options: Any) -> tuple[float, dict[str, float]]:
    """What the learner makes of a batch: the weighted loss and the logged means, over all micro-batches."""
    found, sums = 0.0, {}
    for micro in shard(batch, num_ranks=1, max_tokens=budget)[0]:
        outputs = loss(inputs_of(micro, score(micro), **options))
        assert outputs.loss.shape == (len(micro.targets),)
        found += float((outputs.loss * torch.from_numpy(micro.weights)).sum())
        for name, value in outputs.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return found / batch.num_tokens, {name: value / batch.num_tokens for name, value in sums.items()}


def by_place(micro: MicroBatch) -> Tensor:
    """A log-prob for each token that its rollout and place decide, whatever the micro-batch."""
    places = torch.from_numpy(micro.tokens[micro.targets].astype(np.float32))
    return -(places + 1) / 10 - torch.from_numpy(micro.members[micro.sequences].astype(np.float32)) / 100


def test_a_pair_worked_by_hand() -> None:
    # Chosen: two tokens at -0.5, reference -1 each; rejected: one at -2, reference -1.
    # h of DPO is 0.1 * ((-1 + 2) - (-2 + 1)).
    batch = pair_batch([(answer(7, 2, -1.0), answer(7, 1, -1.0))])
    scores = torch.tensor([-0.5, -0.5, -2.0])
    loss, sums = totals(batch, partial(over_pairs, loss=preference.dpo, beta=0.1), lambda _: scores, budget=100)
    assert loss == pytest.approx(math.log(1 + math.exp(-0.2)), rel=1e-6)
    assert (sums["accuracy"], sums["length_chosen"], sums["length_rejected"]) == (1, 2, 1)
    assert sums["reward_margin"] == pytest.approx(0.2)
    assert sums["nll_chosen"] == pytest.approx(0.5)


def test_the_likelihood_of_the_chosen_answer_is_added_on_demand() -> None:
    batch = pair_batch([(answer(7, 2, -1.0), answer(7, 1, -1.0))])
    scores = torch.tensor([-0.5, -0.5, -2.0])
    plain, rpo = (
        totals(batch, partial(over_pairs, loss=preference.dpo, beta=0.1, nll_coef=coef), lambda _: scores, budget=99)[0]
        for coef in (0.0, 2.0)
    )
    assert rpo - plain == pytest.approx(2 * 0.5)


LOSSES = {
    "dpo": partial(over_pairs, loss=preference.dpo, beta=0.1),
    "cdpo": partial(over_pairs, loss=preference.dpo, beta=0.1, label_smoothing=0.2),
    "robust": partial(over_pairs, loss=preference.robust_dpo, beta=0.1, label_smoothing=0.2),
    "ipo": partial(over_pairs, loss=preference.ipo, beta=0.5),
    "simpo": partial(over_pairs, loss=preference.simpo, beta=2.0, gamma=0.5),
    "orpo": partial(over_pairs, loss=preference.orpo, beta=0.1, nll_coef=0.3),
    "bradley_terry": over_scored_pairs,
}
PAIRS = [(answer(p // 2, 2 + p, -0.2), answer(p // 2, 6 - p, -0.3)) for p in range(5)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_micro_batches_do_not_change_the_mean_over_pairs(name: str, budget: int) -> None:
    batch = pair_batch(PAIRS, margins=[0.0, 0.1, 0.2, 0.3, 0.4])
    whole = totals(batch, LOSSES[name], by_place, budget=10_000)
    parts = [
        totals(pair_batch([pair], margins=[0.1 * i]), LOSSES[name], shifted(i), budget=99)
        for i, pair in enumerate(PAIRS)
    ]
    split = totals(batch, LOSSES[name], by_place, budget=budget)
    assert (
        split[0] == pytest.approx(whole[0], rel=1e-5) == pytest.approx(np.mean([part[0] for part in parts]), rel=1e-5)
    )
    for key, value in whole[1].items():
        assert split[1][key] == pytest.approx(value, rel=1e-5)
        assert value == pytest.approx(np.mean([part[1][key] for part in parts]), rel=1e-5)


def shifted(pair: int) -> Any:
    """`by_place` of a pair as if it stood where it stands in the whole batch."""
    return lambda micro: by_place(micro) - 2 * pair / 100


def test_kto_sees_single_answers_with_labels_and_the_baseline_of_the_batch() -> None:
    # Ratios: desirable 2 * (-0.5 + 1) = 1, undesirable -2 + 1 = -1; baseline 0.25, beta 0.1.
    batch = labelled_batch([answer(7, 2, -1.0), answer(7, 1, -1.0)], [True, False])
    scores = torch.tensor([-0.5, -0.5, -2.0])
    loss, sums = totals(batch, partial(over_labelled, beta=0.1), lambda _: scores, budget=100, kl_baseline=0.25)
    desirable, other = (1 / (1 + math.exp(x)) for x in (0.1 * (1 - 0.25), 0.1 * (0.25 + 1)))
    assert loss == pytest.approx((desirable + other) / 2, rel=1e-5)
    assert sums["desirable"] == pytest.approx(0.5)


def test_a_scorer_is_read_behind_the_last_token_of_each_answer() -> None:
    chosen, rejected = with_end(answer(7, 2)), with_end(answer(7, 1))
    assert chosen.tokens.tolist() == [7, 7, 7, 0, 1, 1]
    assert chosen.loss_mask.tolist() == [False, False, False, True, True, True]
    scores = torch.tensor([9.0, 9.0, 1.5, 9.0, 0.5])
    loss, sums = totals(pair_batch([(chosen, rejected)]), over_scored_pairs, lambda _: scores, budget=100)
    assert loss == pytest.approx(math.log(1 + math.exp(-1.0)), rel=1e-6)
    assert sums["reward_chosen"] == pytest.approx(1.5)
    with_margin, _ = totals(
        pair_batch([(chosen, rejected)], margins=[0.4]), over_scored_pairs, lambda _: scores, budget=100
    )
    assert with_margin == pytest.approx(math.log(1 + math.exp(-0.6)), rel=1e-6)


def test_an_empty_micro_batch_has_no_loss_and_stays_in_the_graph() -> None:
    empty = shard(pair_batch(PAIRS[:1]), num_ranks=2, max_tokens=100)[1][0]
    for name, loss in LOSSES.items():
        logprobs = torch.zeros(len(empty.targets), requires_grad=True)
        outputs = loss(inputs_of(empty, logprobs))
        assert outputs.loss.shape == (0,), name
        outputs.loss.sum().backward()


def test_the_prompt_of_one_and_the_answer_to_another() -> None:
    found = mismatched(answer(7, 2), answer(9, 3, -0.5))
    assert found.tokens.tolist() == [7, 7, 7, 0, 1, 2]
    assert found.loss_mask.tolist() == [False, False, False, True, True, True]
    assert found.logprobs.tolist() == [0, 0, 0, -0.5, -0.5, -0.5]


def test_a_rollout_takes_the_log_probs_of_the_reference() -> None:
    found = with_logprobs(answer(7, 2), np.array([0, 0, 0, -1, -2], np.float32))
    assert found.logprobs.tolist() == [0, 0, 0, -1, -2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "message"),
    [
        ("same", "same", 0.0, "chosen and rejected are the same text 'same'"),
        ("", "other", 0.0, "nothing of the chosen answer trains"),
        ("one", "other", math.nan, "the margin nan is not finite"),
    ],
)
def test_a_pair_that_cannot_teach_is_refused(chosen: str, rejected: str, margin: float, message: str) -> None:
    with pytest.raises(DataError, match=f"problem 'p': {message}"):
        PreferencePair(problem=PROBLEM, chosen=((chosen, True),), rejected=((rejected, True),), margin=margin)


def test_pairs_come_from_a_table_of_texts_or_of_messages(tmp_path: Path) -> None:
    rows = [
        {"question": "1 + 1?", "chosen": "2", "rejected": "3", "gap": 1.5},
        {"question": "2 + 2?", "chosen": [{"role": "assistant", "content": "4"}], "rejected": "5", "gap": 2},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = table_pairs([], path=str(path), margin="gap")
    assert (first.chosen, first.rejected, first.margin) == ((("2", True),), (("3", True),), 1.5)
    assert (second.chosen, second.margin) == ((("4", True),), 2.0)
    with pytest.raises(DataError, match="no column 'better'"):
        table_pairs([], path=str(path), chosen="better")
    with pytest.raises(DataError, match=r"column 'gap' must be a text or a list of chat messages, got 1\.5"):
        table_pairs([], path=str(path), chosen="gap")
    with pytest.raises(DataError, match="column 'rejected' must be a number, got '3'"):
        table_pairs([], path=str(path), margin="rejected")


def test_program_written_pairs_prefer_the_call() -> None:
    pairs = arithmetic_pairs([PROBLEM], size=3, seed=0)
    assert len(pairs) == 3
    for pair in pairs:
        called, direct = pair.demonstrations
        assert "```python" in called.text
        assert "```python" not in direct.text
        assert called.text.endswith("\\boxed{2}")
        assert direct.text.endswith("\\boxed{2}")
