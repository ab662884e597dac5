"""The reward actor in this process: places, what becomes of gradings that are given up, and how it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import reward_plugins

from rlsys.actors.reward import RewardActor
from rlsys.config import PoolConfig, RewardConfig
from rlsys.errors import ActorError, RewardError, RewardTimeoutError
from rlsys.types import Problem, Rollout, RolloutGroup

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))


@pytest.fixture(autouse=True)
def nothing_happened() -> None:
    reward_plugins.HOOKS.clear()
    reward_plugins.GIVEN_UP.clear()


def rollout(response: str) -> Rollout:
    none: Any = np.zeros(0)
    return Rollout(tokens=none, loss_mask=none, logprobs=none, versions=none, response=response)


def new(use: str = "Obedient", *, timeout_seconds: float = 60.0, **pool: Any) -> RewardActor:
    config = RewardConfig(
        name="r", use=f"reward_plugins:{use}", timeout_seconds=timeout_seconds, actors=PoolConfig(**pool)
    )
    return RewardActor(plug_in=config, place="rewards.0")


async def make(use: str = "Obedient", **settings: Any) -> RewardActor:
    actor = new(use, **settings)
    await actor.start()
    return actor


def test_a_grading_takes_a_place_and_gives_it_back_however_it_ends() -> None:
    async def main() -> None:
        actor = await make(timeout_seconds=0.05)
        for session, response in (("1", "2.5"), ("2", "raise no"), ("3", "sleep 60")):
            assert await actor.open(session, "p")
            assert await actor.num_sessions() == 1
            if session == "1":
                assert (await actor.score("1", PROBLEM, rollout(response))).score == 2.5
            else:
                kind = RewardError if session == "2" else RewardTimeoutError
                with pytest.raises(kind, match="reward 'r' "):
                    await actor.score(session, PROBLEM, rollout(response))
            assert await actor.num_sessions() == 0
        assert reward_plugins.HOOKS == ["start"]
        await actor.close_all()
        assert reward_plugins.HOOKS == ["start", "close"]
        assert not await actor.open("4", "p")

    asyncio.run(main())


def test_functions_and_group_rewards_are_hosted_as_well() -> None:
    async def main() -> None:
        function, ranks = await make("length"), await make("Ranks")
        assert await function.open("1", "p")
        assert (await function.score("1", PROBLEM, rollout("four"))).score == 4.0
        assert await ranks.open("1", "p")
        siblings = RolloutGroup(problem=PROBLEM, rollouts=(rollout("a"), rollout("ab")))
        assert [result.score for result in await ranks.score_group("1", siblings)] == [0.0, 0.5]

    asyncio.run(main())


def test_a_full_actor_says_so() -> None:
    async def main() -> None:
        actor = await make(max_sessions=2)
        assert [await actor.open(session, "p") for session in "123"] == [True, True, False]
        under_way = asyncio.create_task(actor.score("1", PROBLEM, rollout("sleep 60")))
        await asyncio.sleep(0.02)
        assert not await actor.open("3", "p")
        await actor.close("2")
        assert await actor.open("3", "p")
        await actor.close("1")
        with pytest.raises(ActorError, match=r"rewards\.0: the grading was given up"):
            await under_way
        await asyncio.sleep(0.02)
        assert reward_plugins.GIVEN_UP == ["sleep 60"]
        await actor.close("unknown")

    asyncio.run(main())


def test_a_place_that_is_not_used_in_time_is_free_again() -> None:
    async def main() -> None:
        actor = await make(max_sessions=1, call_seconds=0.05)
        assert await actor.open("1", "p")
        async with asyncio.timeout(30):
            while not await actor.open("2", "p"):
                await asyncio.sleep(0.01)
        with pytest.raises(ActorError, match="the place is unknown"):
            await actor.score("1", PROBLEM, rollout("1"))

    asyncio.run(main())


def test_an_actor_whose_thread_hangs_takes_nothing_new_ends_what_it_has_and_is_worn_out() -> None:
    async def main() -> None:
        actor = await make("Synchronous", timeout_seconds=0.2)
        assert await actor.open("1", "p")
        assert await actor.open("2", "p")
        with pytest.raises(RewardTimeoutError):
            await actor.score("1", PROBLEM, rollout("hang 2"))
        assert not await actor.open("3", "p")
        assert await actor.state() == "well"
        assert (await actor.score("2", PROBLEM, rollout("7"))).score == 7.0
        assert await actor.state() == "worn out"

    asyncio.run(main())


def test_a_new_actor_has_no_place_before_it_has_started_and_starts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = asyncio.Event()

    async def load(_: object) -> None:
        reward_plugins.HOOKS.append("load")
        await loaded.wait()

    monkeypatch.setattr(reward_plugins.Obedient, "start", load)

    async def main() -> None:
        actor = new()
        assert await actor.state() == "new"
        starting = asyncio.gather(actor.start(), actor.start())
        await asyncio.sleep(0)
        assert not await actor.open("1", "p")
        assert (await actor.state(), await actor.isolation()) == ("new", {})
        loaded.set()
        await starting
        assert await actor.open("2", "p")
        assert await actor.state() == "well"
        assert reward_plugins.HOOKS == ["load"]

    asyncio.run(main())


def test_a_reward_that_cannot_start_says_so_and_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_: object) -> None:
        reward_plugins.HOOKS.append("refused")
        raise OSError("no GPU")

    monkeypatch.setattr(reward_plugins.Obedient, "start", refuse)

    async def main() -> None:
        actor = new()
        for _ in range(2):
            with pytest.raises(OSError, match="no GPU"):
                await actor.start()
        assert not await actor.open("1", "p")
        await actor.close_all()
        assert reward_plugins.HOOKS == ["refused", "refused"]

    asyncio.run(main())


def test_a_surplus_actor_waits_for_its_last_grading() -> None:
    async def main() -> None:
        actor = await make()
        assert await actor.open("1", "p")
        draining = asyncio.create_task(actor.drain(60.0))
        await asyncio.sleep(0)
        assert not await actor.open("2", "p")
        assert not draining.done()
        assert (await actor.score("1", PROBLEM, rollout("3"))).score == 3.0
        assert await draining == 0
        assert await actor.drain(0.0) == 0

    asyncio.run(main())


def test_an_actor_tells_how_well_its_reward_isolates_what_it_runs() -> None:
    async def main() -> None:
        actor = await make()
        assert await actor.isolation() == {}
        actor._term.reward.tier = "T1"
        assert await actor.isolation() == {"r": "T1"}

    asyncio.run(main())
