"""Input that a learner cannot use, or only in one way: each is a clear error or a stated policy.

One rank of FSDP2 in this process stays alive for all tests; what changes its weights puts them back.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import CheckpointError, DataError, TrainingStalledError
from rlsys.learner_group import _merge, check_finite
from rlsys.learners.fsdp import FsdpLearner
from rlsys.packing import shard
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.types import Rollout, TrainBatch
from tests.learners.ranks import (
    OPTIMIZER,
    WIDE,
    Json,
    Ranks,
    assert_close,
    assert_equal,
    batches,
    build,
    free_ports,
    wait_for,
    weights,
)

VOCABULARY = 272
SHAPE: Json = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "words": [],
}
OTHER_MODELS: dict[str, Json] = {
    "wider": {"hidden_size": 48},
    "shallower": {"num_layers": 1},
    "deeper": {"num_layers": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of other models; made first, because a process is in one group at a time."""
    folder = tmp_path_factory.mktemp("others")
    for name, changed in OTHER_MODELS.items():
        build_scratch_model(folder / "model", ScratchModel(**{**SHAPE, **changed}))
        ranks = Ranks(FsdpLearner, folder, rank=0, ports=free_ports(1), world_size=1)
        learner = ranks.start()
        learner.save(str(folder / name))
        wait_for(learner)
        learner.close()
        shutil.rmtree(folder / "model")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return Ranks(FsdpLearner, folder, rank=0, ports=free_ports(1), world_size=1)


@pytest.fixture(scope="module")
def started(ranks: Ranks, others: Path) -> Iterator[Any]:
    assert others.exists()
    learner = ranks.start()
    learner.save(str(ranks.folder / "born"))
    wait_for(learner)
    yield learner
    learner.close()


@pytest.fixture
def learner(started: Any, folder: Path) -> Any:
    """A learner that has not learned anything yet."""
    started.load(str(folder / "born"))
    started._skipped_in_a_row = 0
    return started


def rollout(tokens: list[int], trained: list[bool]) -> Rollout:
    return Rollout(
        tokens=np.array(tokens, dtype=np.int32),
        loss_mask=np.array(trained),
        logprobs=np.where(trained, -2.0, 0.0).astype(np.float32),
        versions=np.where(trained, 0, -1).astype(np.int32),
    )


def batch_of(*rollouts: Rollout, advantage: float = 1.0) -> TrainBatch:
    return TrainBatch(
        rollouts=rollouts,
        advantages=tuple(np.full(len(r), advantage, np.float32) for r in rollouts),
        weights=(1.0,) * len(rollouts),
        num_tokens=max(1, sum(r.num_trained_tokens for r in rollouts)),
    )


def joined(one: TrainBatch, other: TrainBatch) -> TrainBatch:
    """Both in one batch, normalised by the tokens of the first."""
    return replace(
        one,
        rollouts=one.rollouts + other.rollouts,
        advantages=one.advantages + other.advantages,
        weights=one.weights + other.weights,
    )


# --- rollouts that say little ----------------------------------------------------------------------------------------

EMPTY_RESPONSE = rollout([5, 6, 7], [False, False, False])
ONE_TOKEN_THAT_NOBODY_WROTE = rollout([5], [False])
ONE_TOKEN = rollout([5], [True])


@pytest.mark.parametrize("silent", [EMPTY_RESPONSE, ONE_TOKEN_THAT_NOBODY_WROTE, ONE_TOKEN])
def test_a_rollout_in_which_nothing_can_train_changes_nothing_for_the_others(
    ranks: Ranks, learner: Any, folder: Path, silent: Rollout
) -> None:
    batch = batches(folder)[0]
    ranks.step(learner, batch)
    expected = weights(learner)
    learner.load(str(folder / "born"))
    metrics = ranks.step(learner, joined(batch, batch_of(silent)))
    assert metrics["sum/trained_tokens"] == batch.num_tokens
    assert_close(weights(learner), expected)


@pytest.mark.parametrize("silent", [EMPTY_RESPONSE, ONE_TOKEN_THAT_NOBODY_WROTE, ONE_TOKEN])
def test_a_batch_in_which_nothing_can_train_is_a_step_of_zero(ranks: Ranks, learner: Any, silent: Rollout) -> None:
    metrics = ranks.step(learner, batch_of(silent, silent))
    assert (metrics["grad_norm"], metrics["skipped_in_a_row"]) == (0.0, 0.0)
    assert metrics["sum/trained_tokens"] == 0.0


def test_a_batch_whose_tokens_are_all_masked_is_refused_where_it_is_made() -> None:
    with pytest.raises(ValueError, match="without a single trained token"):
        TrainBatch(rollouts=(EMPTY_RESPONSE,), advantages=(np.ones(3, np.float32),), weights=(1.0,), num_tokens=0)


def test_a_batch_of_two_tokens_trains_one(ranks: Ranks, learner: Any) -> None:
    metrics = ranks.step(learner, batch_of(rollout([5, 6], [False, True])))
    assert metrics["sum/trained_tokens"] == 1.0
    assert metrics["grad_norm"] > 0


def test_a_rollout_longer_than_the_token_budget_is_a_micro_batch_of_its_own(
    ranks: Ranks, learner: Any, folder: Path
) -> None:
    batch = batches(folder)[0]
    budget = 5
    assert max(map(len, batch.rollouts)) > budget
    ranks.step(learner, batch, budget=WIDE)
    expected = weights(learner)
    learner.load(str(folder / "born"))
    metrics = ranks.step(learner, batch, budget=budget)
    assert metrics["micro_batches"] >= sum(len(r) > budget for r in batch.rollouts)
    assert_close(weights(learner), expected)


# --- nothing to learn ------------------------------------------------------------------------------------------------


def without_credit(batch: TrainBatch) -> TrainBatch:
    return replace(batch, advantages=tuple(np.zeros_like(advantage) for advantage in batch.advantages))


def test_a_first_step_without_any_advantage_moves_the_weights_by_their_decay_alone(
    ranks: Ranks, learner: Any, folder: Path
) -> None:
    before = weights(learner)
    metrics = ranks.step(learner, without_credit(batches(folder)[0]))
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-9)  # the policy is the reference, so the KL is 0 too
    assert metrics["skipped_in_a_row"] == 0.0
    kept = 1 - metrics["lr"] * OPTIMIZER.weight_decay
    assert metrics["update_norm"] == pytest.approx((1 - kept) * metrics["parameter_norm"] / kept, rel=1e-2)
    for name, weight in weights(learner).items():
        assert torch.allclose(weight, before[name] * kept, atol=1e-6), name


def test_a_later_step_without_any_advantage_is_a_step_momentum_still_moves_the_weights(
    ranks: Ranks, learner: Any, folder: Path
) -> None:
    one, two, *_ = batches(folder)
    loss = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.0}
    ranks.step(learner, one)
    share = shard(without_credit(two), num_ranks=1, max_tokens=WIDE)[0]
    metrics = learner.step(share, num_tokens=two.num_tokens, temperature=0.9, **loss)
    assert (metrics["grad_norm"], metrics["skipped_in_a_row"]) == (0.0, 0.0)
    assert metrics["update_norm"] > 10 * metrics["lr"] * OPTIMIZER.weight_decay * metrics["parameter_norm"]


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_log_probs_of_an_engine_that_are_no_numbers_never_become_a_rollout(wrong: float) -> None:
    with pytest.raises(ValueError, match="log-probs must be finite"):
        replace(EMPTY_RESPONSE, logprobs=np.array([0.0, wrong, 0.0], np.float32))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_step_with_an_advantage_that_is_no_number_is_skipped_and_counted(
    ranks: Ranks, learner: Any, folder: Path, wrong: float
) -> None:
    batch = batches(folder)[0]
    first, *rest = batch.advantages
    before = weights(learner)
    for times in (1, 2):
        metrics = ranks.step(learner, replace(batch, advantages=(np.full_like(first, wrong), *rest)))
        assert metrics["skipped_in_a_row"] == times
        assert not math.isfinite(metrics["grad_norm"])
        assert metrics["update_norm"] == 0.0
    assert_equal(weights(learner), before)


def test_steps_whose_own_log_probs_are_no_numbers_are_skipped_until_the_run_stops(
    ranks: Ranks, learner: Any, folder: Path
) -> None:
    batch = batches(folder)[0]
    spoilt = next(learner._policy.parameters())
    with torch.no_grad():
        spoilt.mul_(math.nan)
    metrics = _merge([ranks.step(learner, batch)], batch.num_tokens)
    assert metrics["skipped_in_a_row"] == 1
    check_finite(metrics, 2)
    metrics = _merge([ranks.step(learner, batch)], batch.num_tokens)
    with pytest.raises(TrainingStalledError, match="2 steps in a row had no finite gradient"):
        check_finite(metrics, 2)


# --- another vocabulary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [VOCABULARY, -1, 2**31 - 1])
@pytest.mark.parametrize("trained", [True, False])
def test_a_token_id_outside_the_vocabulary_is_one_clear_error_and_nothing_was_learned(
    ranks: Ranks, learner: Any, folder: Path, token: int, trained: bool
) -> None:
    before = weights(learner)
    strange = batch_of(rollout([5, token, 6], [False, trained, True]))
    says = rf"token id {token}, but the vocabulary of {folder}/model is {VOCABULARY} \(ids 0 to {VOCABULARY - 1}\)"
    with pytest.raises(DataError, match=says):
        ranks.step(learner, joined(batches(folder)[0], strange))
    with pytest.raises(DataError, match=says):
        learner.infer(shard(strange, num_ranks=1, max_tokens=WIDE)[0], temperature=1.0)
    assert_equal(weights(learner), before)
    assert math.isfinite(ranks.step(learner, batches(folder)[0])["grad_norm"]), "the learner is as good as before"


def test_the_last_token_id_of_the_vocabulary_is_learned(ranks: Ranks, learner: Any) -> None:
    metrics = ranks.step(learner, batch_of(rollout([0, VOCABULARY - 1, 0], [False, True, True])))
    assert metrics["sum/trained_tokens"] == 2.0


# --- checkpoints that do not fit -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(started: Any, folder: Path) -> Path:
    """A good checkpoint."""
    assert started
    return folder / "born"


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def cut_a_shard(folder: Path) -> None:
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])


def lose_the_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def cut_the_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-100])


def empty_the_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"")


def fill_the_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"not at all a pickle")


@pytest.mark.parametrize(
    "damage",
    [lose_a_shard, cut_a_shard, lose_the_metadata, cut_the_metadata, empty_the_metadata, fill_the_metadata],
)
def test_a_checkpoint_that_is_not_whole_is_one_clear_error(
    learner: Any, whole: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    damage(damaged)
    with pytest.raises(CheckpointError, match=str(damaged)) as found:
        learner.load(str(damaged))
    assert len(str(found.value)) < 1000, "one message, no tracebacks of all ranks"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("wider", r"embed_tokens.weight is \[272, 48\] there and \[272, 32\] in the model"),
        ("shallower", r"it has no model.hf.model.layers.1"),
        ("deeper", r"the model has no model.hf.model.layers.2"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_a_weight_is_touched(
    learner: Any, others: Path, other: str, says: str
) -> None:
    before = weights(learner)
    with pytest.raises(CheckpointError, match=rf"{others / other} is of another model .*{says}"):
        learner.load(str(others / other))
    assert_equal(weights(learner), before)
