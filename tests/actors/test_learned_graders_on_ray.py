"""A judge on vLLM and a reward model, each in Ray actors of its own, as a run hosts them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2ForSequenceClassification

from rlsys.config import PoolConfig, RewardConfig
from rlsys.errors import RewardError
from rlsys.plugins import resolve
from rlsys.pool import ActorPool
from rlsys.remote_reward import remote_term
from rlsys.scratch import WORDS, ScratchModel, build_scratch_model
from rlsys.types import Problem, Rollout, RolloutGroup

MODEL = ScratchModel(
    hidden_size=64,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=128,
    max_length=4096,
    words=[*WORDS, " no", " A", " B"],
    initializer_range=0.2,
)
TASK = Problem(id="p", prompt=({"role": "user", "content": "What is 2 + 2?"},), answer="4")


def rollout(response: str) -> Rollout:
    none: Any = np.zeros(0)
    return Rollout(tokens=none, loss_mask=none, logprobs=none, versions=none, response=response, reward=0.0)


async def graded(config: RewardConfig, responses: Sequence[str]) -> list[Any]:
    """What a pool of this reward makes of the responses, all at once; of a group where it grades groups."""
    pool = ActorPool(config, place="rewards.0", host="rlsys.actors.reward:RewardActor")
    term = remote_term(config, resolve(config.use, place="test"))

    async def tell(actors: Sequence[Any]) -> None:
        term.reward.use_actors(actors)

    await pool.start()
    try:
        await pool.serve(tell)
        rollouts = tuple(map(rollout, responses))
        if term.grades_groups:
            return list(await term.grade_group(RolloutGroup(problem=TASK, rollouts=rollouts)))
        return list(await asyncio.gather(*(term.grade(TASK, one) for one in rollouts)))
    finally:
        await pool.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_judges_and_reward_models_grade_in_actors_of_their_own(on_ray: asyncio.Runner, tmp_path: Path) -> None:
    folder = build_scratch_model(tmp_path / "judge", MODEL)
    pool = PoolConfig(count=1, cpus=0.1, start_seconds=300.0)
    options = {
        "path": str(folder),
        "max_reason_tokens": 16,
        "max_response_tokens": 256,
        "engine_options": {"max_model_tokens": 4096, "max_rollouts": 16},
    }
    config = RewardConfig(name="judge", use="rlsys.rewards.judge:JudgeReward", options=options, actors=pool)
    results = on_ray.run(graded(config, ["4", "5", "4", "<think>hm"]))
    assert [result.status for result in results[3:]] == ["no_answer"]
    assert all(0 < result.score < 1 and result.status in ("correct", "wrong") for result in results[:3])
    assert results[0].score == pytest.approx(results[2].score, abs=1e-4)

    config = RewardConfig(
        name="elo",
        use="rlsys.rewards.judge:PairwiseJudge",
        options={**options, "max_reason_tokens": 0},
        actors=pool,
    )
    results = on_ray.run(graded(config, ["4", "5", "six"]))
    assert sum(result.terms["elo"] for result in results) == pytest.approx(0, abs=1e-6)

    spec = {
        "type": "score_model",
        "model": str(folder),
        "input": [{"role": "user", "content": "Grade {{ sample.output_text }}"}],
        "sampling_params": {"max_tokens": 8},
        "engine": {"use": "rlsys.rewards.judge:ChatEngine", "options": options["engine_options"]},
    }
    config = RewardConfig(name="spec", use="rlsys.rewards.graders:GraderReward", options={"spec": spec}, actors=pool)
    with pytest.raises(RewardError, match="reward 'spec'"):  # random weights write no number, however often
        on_ray.run(graded(config, ["4"]))

    torch.manual_seed(0)
    settings = AutoConfig.from_pretrained(folder)
    settings.num_labels = 1
    Qwen2ForSequenceClassification(settings).save_pretrained(folder)
    config = RewardConfig(
        name="model", use="rlsys.rewards.reward_model:RewardModel", options={"path": str(folder)}, actors=pool
    )
    results = on_ray.run(graded(config, ["4", "5", "4"]))
    assert results[0].score == pytest.approx(results[2].score, abs=1e-5)
    assert results[0].score != pytest.approx(results[1].score, abs=1e-6)
