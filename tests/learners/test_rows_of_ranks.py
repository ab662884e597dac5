"""Tensor parallelism without other processes: what is refused, and what the driver makes of ranks in rows."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlsys import cluster
from rlsys.config import LearnersConfig
from rlsys.errors import ConfigError
from rlsys.learner_group import LearnerGroup
from rlsys.learners.fsdp import FsdpLearner
from rlsys.learners.model import Policy
from rlsys.learners.tensor_parallel import check_fits
from tests.learners.ranks import NARROW, Json, batches, build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    build(folder)
    return folder


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"tensor_parallel": 2}, 3, r"is 2, which does not divide the 3 ranks; set learners.count .* to 4"),
        ({"tensor_parallel": 4}, 2, r"is 4, which does not divide the 2 ranks; set learners.count .* to 4"),
        ({"tensor_parallel": 0}, 2, r"tensor_parallel is 0; give a number of ranks"),
        ({"tensor_parallel": "two"}, 2, r"tensor_parallel is 'two'; give a number of ranks"),
        ({"tensor_paralel": 2}, 2, r"unknown option 'tensor_paralel'; did you mean `tensor_parallel`"),
    ],
)
def test_ranks_that_are_no_whole_rows_are_refused(options: Json, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FsdpLearner.check_config(LearnersConfig(count=count, options=options), {})


def test_liger_is_refused_beside_rows() -> None:
    with pytest.raises(ConfigError, match=r"learners\.liger=true and learners\.options\.tensor_parallel=2"):
        FsdpLearner.check_config(LearnersConfig(gpus=1, liger=True, options={"tensor_parallel": 2}), {})


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (3, {}, r"tensor_parallel is 3, which does not divide the num_attention_heads of .*, 4; .* may be 1 or 2"),
        (4, {}, r"tensor_parallel is 4, which does not divide the num_key_value_heads of .*, 2; .* may be 1 or 2"),
        (2, {"intermediate_size": 45}, r"does not divide the intermediate_size of .*, 45; .* may be 1"),
        (2, {"base_model_tp_plan": None}, r"for qwen2 transformers has no plan; set it to 1"),
        (
            2,
            {"base_model_tp_plan": {"layers.*.mlp": "moe_tp_experts"}},
            r"has a plan with moe_tp_experts, which is not known here",
        ),
    ],
)
def test_layers_that_cannot_be_cut_are_refused_with_the_number_and_the_fix(
    folder: Path, size: int, changes: Json, message: str
) -> None:
    policy = Policy.load(str(folder / "model"))
    for name, value in changes.items():
        setattr(policy.hf.config, name, value)
    with pytest.raises(ConfigError, match=message):
        check_fits(policy, size, model="tiny")


# --- ranks together --------------------------------------------------------------------------------------------------


class Rank:
    """A rank that says of each trained token the number of its rollout."""

    def __init__(self) -> None:
        self.shares: list[Any] = []

    async def call(self, method: str, share: Any, **_: Any) -> Any:
        self.shares.append(share)
        return [micro.members[micro.sequences].astype(np.float32) for micro in share] if method == "infer" else {}


def test_the_ranks_of_a_row_get_the_same_share_and_are_heard_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "put", lambda value: value)
    ranks, batch = [Rank() for _ in range(4)], batches(folder)[0]
    learners = LearnersConfig(count=4, options={"tensor_parallel": 2}, max_tokens_per_micro_batch=NARROW)
    group = LearnerGroup(ranks, None, SimpleNamespace(learners=learners))  # type: ignore[arg-type]
    found = asyncio.run(group.infer(batch, temperature=1.0))
    assert ranks[0].shares[0] is ranks[1].shares[0]
    assert ranks[2].shares[0] is ranks[3].shares[0]
    members = [member for rank in (ranks[0], ranks[2]) for micro in rank.shares[0] for member in micro.members]
    assert sorted(members) == list(range(len(batch.rollouts)))
    for number, (rollout, values) in enumerate(zip(batch.rollouts, found, strict=True)):
        mask = rollout.loss_mask.copy()
        mask[0] = False
        assert values.tolist() == (mask * number).tolist()
