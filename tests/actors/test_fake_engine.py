"""The fake engine: what its tokens depend on, when it writes them, and that it takes part in real weight transfers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from rlsys.actors.fake_engine import FakeEngine
from rlsys.config import ActorsConfig
from rlsys.errors import ActorError, ConfigError, EngineDiedError
from rlsys.learners.sender import open_sender
from rlsys.types import Completion
from rlsys.weights import GLOO_BACKEND, WeightGroup, WeightPlan, checksum
from tests.learners.ranks import free_ports

PROMPT = [5, 6, 7]
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64, "stop": []}
END = 1
SLOW = {"tokens_per_second": 1000.0, "chunk_tokens": 4, "spread": 0.0, "median_tokens": 60.0}
T = TypeVar("T")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 40, "eos_token_id": END}))
    return str(tmp_path)


def engine(model: str, *, worker_seed: int = 0, max_rollouts: int = 64, **options: Any) -> FakeEngine:
    config = ActorsConfig(engine_options=options, max_rollouts=max_rollouts, sync_seconds=20)
    return FakeEngine(model_path=model, config=config, seed=worker_seed)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def written(made: FakeEngine, *, count: int = 3, **sampling: Any) -> list[list[int]]:
    completions = [await made.generate(PROMPT, sampling=SAMPLING | sampling) for _ in range(count)]
    return [completion.tokens.tolist() for completion in completions]


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_what_it_writes_depends_on_the_seed_the_prompt_and_the_number_of_the_request(model: str) -> None:
    first = run(written(engine(model)))
    assert run(written(engine(model))) == first
    assert len({tuple(tokens) for tokens in first}) == 3, "siblings differ"
    assert run(written(engine(model, worker_seed=1))) != first
    assert run(written(engine(model, worker_seed=1, seed=0))) == first, "one seed for all workers"
    assert run(engine(model).generate([5, 6, 8], sampling=SAMPLING)).tokens.tolist() != first[0]


def test_requests_with_a_seed_of_their_own_are_equal_wherever_and_whenever_they_are_made(model: str) -> None:
    one, two = (run(written(engine(model, worker_seed=seed), seed=7)) for seed in (0, 1))
    assert one == two == [one[0]] * 3
    assert run(written(engine(model), seed=8)) != one


def test_siblings_are_numbered_anew_under_each_version(model: str) -> None:
    async def main() -> None:
        made = engine(model)
        first = await written(made)
        await made.pause()
        await made.resume(1)
        assert await written(made) == first

    run(main())


def test_tokens_are_in_the_vocabulary_and_their_logprobs_are_those_of_the_distribution(model: str) -> None:
    async def main() -> list[Completion]:
        made = engine(model, median_tokens=2000.0)
        return [await made.generate(PROMPT, sampling=SAMPLING | {"max_tokens": 4000}) for _ in range(10)]

    completions = run(main())
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert stopped
    assert all(completion.tokens[-1] == END for completion in stopped)
    tokens = np.concatenate([completion.tokens for completion in completions])
    logprobs = np.concatenate([completion.logprobs for completion in completions])
    assert (tokens >= 0).all()
    assert (tokens < 40).all()
    # Of 39 tokens the likeliest has 1 / (1 + 1/2 + ... + 1/39) = 0.2351; the next one half of that.
    shares = np.sort(np.bincount(tokens) / len(tokens))[::-1]
    assert shares[:2] == pytest.approx([0.2351, 0.1176], abs=0.02)
    assert np.exp(logprobs.max()) == pytest.approx(0.2351, abs=1e-4)
    assert np.isfinite(logprobs).all()


def test_lengths_are_lognormal_and_cut_at_the_budget(model: str) -> None:
    made = engine(model, median_tokens=20.0, spread=0.5)
    lengths = [len(tokens) for tokens in run(written(made, count=400, max_tokens=10_000))]
    assert np.median(lengths) == pytest.approx(20, abs=2)
    assert np.std(np.log(lengths)) == pytest.approx(0.5, abs=0.06)
    cut = run(engine(model, median_tokens=100.0, spread=0.0).generate(PROMPT, sampling=SAMPLING))
    assert (len(cut.tokens), cut.finish_reason) == (64, "length")
    ignoring = run(engine(model, spread=0.0).generate(PROMPT, sampling=SAMPLING | {"ignore_eos": True}))
    assert (len(ignoring.tokens), ignoring.finish_reason) == (64, "length")


def test_a_pause_in_the_middle_keeps_what_is_written_and_what_follows_carries_the_new_version(model: str) -> None:
    async def main() -> None:
        made = engine(model, **SLOW)
        await made.start()
        writing = asyncio.create_task(made.generate(PROMPT, sampling=SAMPLING))
        await until(lambda: made._num_tokens >= 8)
        await made.pause()
        frozen = (await made.pulse())["tokens"]
        await asyncio.sleep(0.05)
        assert await made.pulse() == {"tokens": frozen, "running": 1}
        await made.resume(3)
        completion = await writing
        assert completion.versions.tolist() == [0] * frozen + [3] * (60 - frozen)
        assert await made.pulse() == {"tokens": 60, "running": 0}

    run(main())


def test_no_more_completions_are_written_at_once_than_it_may(model: str) -> None:
    async def main() -> None:
        made = engine(model, max_rollouts=2, **SLOW)
        tasks = [asyncio.create_task(made.generate(PROMPT, sampling=SAMPLING)) for _ in range(4)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) <= 2
        assert (await made.pulse())["running"] == 4 - len(done), "those that wait count as well"
        await asyncio.gather(*tasks)

    run(main())


def test_a_cancelled_request_leaves_the_engine(model: str) -> None:
    async def main() -> None:
        made = engine(model, max_rollouts=1, **SLOW)
        tasks = [asyncio.create_task(made.generate(PROMPT, sampling=SAMPLING)) for _ in range(2)]
        await until(lambda: made._num_tokens >= 4)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert (await made.pulse())["running"] == 0
        assert len((await tasks[1]).tokens) == 60

    run(main())


@pytest.mark.parametrize("paused", [False, True])
def test_an_engine_that_was_closed_ends_everything_with_a_typed_error(model: str, paused: bool) -> None:
    async def main() -> None:
        made = engine(model, **SLOW)
        writing = asyncio.create_task(made.generate(PROMPT, sampling=SAMPLING))
        await until(lambda: made._num_tokens >= 8)
        if paused:
            await made.pause()
        made.close()
        for asked in (writing, made.pulse(), made.pause(), made.resume(1), made.generate(PROMPT, sampling=SAMPLING)):
            with pytest.raises(EngineDiedError, match="has ended"):
                await asked

    run(main())


def test_an_option_that_does_not_exist_is_refused_by_name(model: str) -> None:
    with pytest.raises(ConfigError, match="did you mean `tokens_per_second`"):
        engine(model, tokens_per_secnd=3)


# --- weights ---------------------------------------------------------------------------------------------------------

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
PLAN = WeightPlan(names=["a", "b"], dtype_names=["float32", "bfloat16"], shapes=[[2, 3], [5]])


def send(group: WeightGroup, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """What a learner does; one that sends fewer than planned leaves in the middle."""
    sender = open_sender(GLOO_BACKEND, group, seconds=20, device=torch.device("cpu"))
    sender.send(tensors)
    sender.close()


async def transferred(made: FakeEngine, *names: str) -> dict[str, int]:
    group = WeightGroup(master_address="127.0.0.1", master_port=free_ports(1)[0], world_size=2)
    with ThreadPoolExecutor() as threads:
        sending = asyncio.get_running_loop().run_in_executor(
            threads, send, group, [(name, TENSORS[name]) for name in names]
        )
        await made.open_weights(group, rank=1)
        try:
            return await made.receive_weights(PLAN)
        finally:
            await sending


def test_weights_arrive_are_proved_and_change_what_is_written(model: str) -> None:
    async def main() -> None:
        made, same = engine(model), engine(model)
        before = await written(made)
        sums = await transferred(made, "a", "b")
        assert sums == {name: checksum(tensor) for name, tensor in TENSORS.items()}
        await made.resume(1)
        after = await written(made)
        assert after != before
        await transferred(same, "a", "b")
        await same.resume(2)
        assert await written(same) == after, "the weights count, not their version"
        made.close()
        same.close()

    run(main())


def test_a_transfer_that_breaks_off_is_an_error_and_the_engine_can_be_given_weights_again(model: str) -> None:
    async def main() -> None:
        made = engine(model)
        with pytest.raises(RuntimeError):
            await transferred(made, "a")
        assert await transferred(made, "a", "b")
        made.close()

    run(main())


def test_weights_are_refused_while_it_generates(model: str) -> None:
    async def main() -> None:
        made = engine(model, **SLOW)
        writing = asyncio.create_task(made.generate(PROMPT, sampling=SAMPLING))
        await until(lambda: made._num_tokens >= 4)
        with pytest.raises(ActorError, match="pause it first"):
            await made.receive_weights(PLAN)
        await writing

    run(main())
