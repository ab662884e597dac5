"""Rewards in actors of their own: what is tried again and what is not, places that run out, and chaos on real Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reward_plugins
from pool_plugins import FakeActor

from rlsys import cluster
from rlsys.actors.reward import RewardActor
from rlsys.actors.rollout import RolloutActor
from rlsys.config import ANSWER_SECONDS, PoolConfig, RewardConfig
from rlsys.config_file import load_config
from rlsys.errors import ActorError, RewardError, RewardTimeoutError
from rlsys.plugins import resolve
from rlsys.pool import ActorPool
from rlsys.remote_reward import remote_term
from rlsys.reward_terms import RewardTerm, grade_group
from rlsys.run import _demands
from rlsys.types import Problem, Rollout, RolloutGroup

PROBLEM = Problem(id="p", prompt=({"role": "user", "content": "?"},))


@pytest.fixture(autouse=True)
def nothing_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    reward_plugins.HOOKS.clear()
    reward_plugins.GIVEN_UP.clear()
    monkeypatch.setattr("rlsys.remote_reward.ANSWER_SECONDS", 0.2)


def rollout(response: str) -> Rollout:
    none: Any = np.zeros(0)
    return Rollout(tokens=none, loss_mask=none, logprobs=none, versions=none, response=response)


def config(use: str = "Obedient", *, timeout_seconds: float = 60.0, **pool: Any) -> RewardConfig:
    return RewardConfig(
        name="r", use=f"reward_plugins:{use}", timeout_seconds=timeout_seconds, actors=PoolConfig(**pool)
    )


async def make(count: int = 2, use: str = "Obedient", **settings: Any) -> tuple[RewardTerm, list[FakeActor]]:
    """The term as a rollout actor has it, and the actors of its pool."""
    reward = config(use, **settings)
    actors = [FakeActor(f"rewards.0 actor {index}", reward, RewardActor) for index in range(count)]
    for actor in actors:
        await actor.host.start()
    term = remote_term(reward, resolve(reward.use, place="test"))
    term.reward.use_actors(actors)
    return term, actors


async def score(term: RewardTerm, response: str) -> float:
    return (await term.grade(PROBLEM, rollout(response))).score


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def loads(actors: Sequence[FakeActor]) -> list[int]:
    return [await actor.host.num_sessions() for actor in actors]


def asked(actors: Sequence[FakeActor]) -> Counter[str]:
    return Counter(method for actor in actors for method in actor.asked)


# --- what a rollout sees ---------------------------------------------------------------------------------------------


def test_a_reward_in_a_pool_grades_as_it_does_inline_and_what_it_raises_is_not_tried_again() -> None:
    async def main() -> None:
        term, actors = await make()
        assert await score(term, "2.5") == 2.5
        with pytest.raises(RewardError, match=r"^reward 'r' raised ValueError: no$"):
            await score(term, "raise no")
        assert asked(actors) == {"open": 2, "score": 2}
        assert await loads(actors) == [0, 0]

    asyncio.run(main())


def test_a_reward_of_groups_is_one_in_a_pool_too() -> None:
    async def main() -> None:
        term, _ = await make(use="Ranks")
        assert term.grades_groups
        siblings = RolloutGroup(problem=PROBLEM, rollouts=tuple(rollout(text) for text in ("a", "abc", "ab")))
        found = await grade_group(siblings, [term], step=0)
        assert found.rewards.tolist() == pytest.approx([0.0, 2 / 3, 1 / 3])
        broken = RolloutGroup(problem=PROBLEM, rollouts=(rollout("fail"), rollout("b")))
        lost = await grade_group(broken, [term], step=0)
        assert lost.dropped == {"reward_error: reward 'r' raised ValueError: one of them is not to be compared": 2}

    asyncio.run(main())


def test_gradings_are_spread_over_the_actors() -> None:
    async def main() -> None:
        term, actors = await make(3)
        tasks = [asyncio.create_task(score(term, "sleep 60")) for _ in range(6)]
        await asyncio.sleep(0.02)
        assert await loads(actors) == [2, 2, 2]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: reward_plugins.GIVEN_UP == ["sleep 60"] * 6)
        assert await loads(actors) == [0, 0, 0]

    asyncio.run(main())


# --- actors that die or hang -----------------------------------------------------------------------------------------


def test_a_grading_whose_actor_dies_is_made_again_in_another_one() -> None:
    async def main() -> None:
        term, actors = await make()
        grading = asyncio.create_task(score(term, "sleep 0.1"))
        await asyncio.sleep(0.02)
        (busy,) = [actor for actor in actors if await actor.host.num_sessions()]
        busy.die()
        assert await grading == 1.0
        assert asked(actors)["score"] == 2

    asyncio.run(main())


def test_what_kills_three_actors_in_a_row_is_a_failure_and_not_tried_on_the_rest() -> None:
    async def main() -> None:
        term, actors = await make(5)
        grading = asyncio.create_task(score(term, "sleep 60"))
        for dead in range(1, 4):
            await until(lambda dead=dead: asked(actors)["score"] == dead)
            for actor in actors:
                if actor.alive and await actor.host.num_sessions():
                    actor.die()
        with pytest.raises(RewardError, match=r"3 actors in a row did not survive one grading; .* died during score"):
            await grading
        assert sum(not actor.alive for actor in actors) == 3

    asyncio.run(main())


def test_a_grading_that_is_late_is_not_tried_again() -> None:
    async def main() -> None:
        term, actors = await make(timeout_seconds=0.05)
        with pytest.raises(RewardTimeoutError, match=r"^reward 'r' did not grade within 0\.05 s$"):
            await score(term, "sleep 60")
        assert asked(actors) == {"open": 1, "score": 1}
        assert reward_plugins.GIVEN_UP == ["sleep 60"]
        assert await loads(actors) == [0, 0]

    asyncio.run(main())


def test_an_actor_that_does_not_answer_is_left_and_asked_again_only_after_it_has_answered() -> None:
    async def main() -> None:
        term, (hung, other) = await make(timeout_seconds=0.1)
        call = hung.call

        async def hang(method: str, *args: Any, seconds: float) -> Any:
            if method == "score":
                hung.awake.clear()
            return await call(method, *args, seconds=seconds)

        hung.call = hang  # type: ignore[method-assign]
        term.reward.use_actors([hung])
        with pytest.raises(RewardTimeoutError, match=r"^reward 'r': rewards\.0 actor 0 did not answer within 0\.1 s$"):
            await score(term, "1")
        hung.call = call  # type: ignore[method-assign]
        term.reward.use_actors([hung, other])
        before = len(hung.asked)
        assert [await score(term, "1") for _ in range(5)] == [1.0] * 5
        assert len(hung.asked) <= before + 1  # to be told that the grading was given up
        hung.awake.set()
        await asyncio.sleep(0.02)
        tasks = [asyncio.create_task(score(term, "sleep 0.02")) for _ in range(4)]
        assert await asyncio.gather(*tasks) == [1.0] * 4
        assert len(hung.asked) > before + 1

    asyncio.run(main())


def test_an_actor_that_was_replaced_does_not_know_the_place_and_another_one_is_found() -> None:
    async def main() -> None:
        term, (actor,) = await make(1)
        call = actor.call

        async def forget(method: str, *args: Any, seconds: float) -> Any:
            if method == "score" and asked([actor])["score"] == 0:
                actor.come_back()
                await actor.host.start()
            return await call(method, *args, seconds=seconds)

        actor.call = forget  # type: ignore[method-assign]
        assert await score(term, "4") == 4.0
        assert reward_plugins.HOOKS == ["start", "start"]

    asyncio.run(main())


# --- places ----------------------------------------------------------------------------------------------------------


def test_who_finds_all_places_taken_waits_in_line_and_the_wait_is_no_part_of_the_deadline() -> None:
    async def main() -> None:
        term, actors = await make(1, max_sessions=1, timeout_seconds=0.3)
        found = await asyncio.gather(*(score(term, "sleep 0.05") for _ in range(12)))  # 0.6 s in all
        assert found == [1.0] * 12
        assert asked(actors)["score"] == 12

    asyncio.run(main())


def test_the_wait_for_a_place_has_a_deadline_of_its_own() -> None:
    async def main() -> None:
        term, _ = await make(1, max_sessions=1, wait_seconds=0.1)
        holding = asyncio.create_task(score(term, "sleep 60"))
        await asyncio.sleep(0.01)
        with pytest.raises(RewardError, match=r"reward 'r': none of its 1 actors had a place within 0\.1 s; give it"):
            await score(term, "1")
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)

    asyncio.run(main())


# --- the pool in the driver ------------------------------------------------------------------------------------------


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[FakeActor]:
    """All actors that were ever placed."""
    made: list[FakeActor] = []

    def place(cls: type, demand: cluster.Demand, arguments: Sequence[Any], **_: Any) -> list[FakeActor]:
        assert cls is RewardActor
        new = [FakeActor(f"{demand.what} {index}", each["plug_in"], cls) for index, each in enumerate(arguments)]
        made.extend(new)
        return new

    monkeypatch.setattr(cluster, "place", place)
    return made


def test_a_pool_hosts_rewards_and_replaces_those_that_are_worn_out(placed: list[FakeActor]) -> None:
    async def main() -> None:
        pool = ActorPool(config(count=2, watch_seconds=0.01), place="rewards.0")
        await pool.start()
        placed[1].host._term.threads._late.append(_Hanging())
        await until(lambda: placed[1].killed)
        assert [actor.killed for actor in placed] == [[], ["to be replaced"]]
        await pool.close()

    asyncio.run(main())


def test_an_actor_that_ray_made_anew_is_started_by_the_pool_and_has_as_long_for_it_as_at_first(
    placed: list[FakeActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = asyncio.Event()

    async def load(_: object) -> None:
        reward_plugins.HOOKS.append("load")
        if len(reward_plugins.HOOKS) > 1:
            await loaded.wait()

    monkeypatch.setattr(reward_plugins.Obedient, "start", load)
    monkeypatch.setattr(RewardConfig, "look_seconds", 0.1)

    async def main() -> None:
        pool = ActorPool(config(count=1, watch_seconds=0.01, start_seconds=600.0), place="rewards.0")
        await pool.start()
        (actor,) = placed
        actor.come_back()
        await until(lambda: reward_plugins.HOOKS == ["load", "load"])
        await asyncio.sleep(0.3)  # longer than a look may take
        assert not await actor.host.open("1", "p")
        loaded.set()
        await until(lambda: actor.host._term is not None)
        assert actor.killed == []
        actor.awake.clear()
        await until(lambda: actor.killed == ["to be replaced"])
        await pool.close()

    asyncio.run(main())


class _Hanging:
    def is_alive(self) -> bool:
        return True


def test_an_actor_is_given_longer_than_a_grading_before_it_is_taken_for_hung() -> None:
    assert config(timeout_seconds=300.0, call_seconds=2.0).look_seconds == 300.0 + 2 * ANSWER_SECONDS
    assert config(timeout_seconds=1.0, call_seconds=20.0).look_seconds == 20.0


# --- in a run --------------------------------------------------------------------------------------------------------

YAML = """\
name: demo
model: {scratch: {hidden_size: 32, num_heads: 2, num_kv_heads: 1}}
data:
  train: {use: "stack_plugins:words_problems", options: {size: 1}}
  held_out: {use: "stack_plugins:words_problems", options: {size: 1}}
rewards:
  - {name: inline, use: "reward_plugins:length"}
  - {name: pooled, use: "reward_plugins:Obedient", actors: {count: 3, cpus: 0.5}}
  - {name: ranks, use: "reward_plugins:Ranks", actors: {count: 1}}
"""


def test_pools_of_rewards_are_asked_for_and_rollout_actors_hold_what_stands_for_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    found = load_config(tmp_path / "run.yaml")
    asked_for = {demand.what: (demand.count, demand.each) for demand in _demands(found, ["eval"])}
    assert asked_for["rewards.1 actor"] == (3, {"CPU": 0.5})
    assert asked_for["rewards.2 actor"] == (1, {"CPU": 1.0})

    async def main() -> None:
        actor = RolloutActor(config=found, model_path="nowhere", index=0)
        assert [term.grades_groups for term in actor._rewards] == [False, False, True]
        host = FakeActor("rewards.1 actor 0", found.rewards[1], RewardActor)
        await host.host.start()
        await actor.use_actors("rewards.1", [host])  # type: ignore[list-item]
        assert await score(actor._rewards[1], "6") == 6.0

    asyncio.run(main())


# --- on Ray ----------------------------------------------------------------------------------------------------------


async def pid(actor: Any) -> int:
    """The process of an actor, waited for where it is being replaced."""
    while True:
        try:
            return int(await actor.call("pid", seconds=5))
        except ActorError:
            await asyncio.sleep(0.1)


async def start_on_ray(reward: RewardConfig) -> tuple[ActorPool, RewardTerm]:
    pool = ActorPool(reward, place="rewards.0", host="reward_plugins:TellingRewardActor")
    term = remote_term(reward, resolve(reward.use, place="test"))

    async def tell(actors: Sequence[Any]) -> None:
        term.reward.use_actors(actors)

    await pool.start()
    await pool.serve(tell)
    return pool, term


def test_on_ray_what_hangs_in_any_way_is_timed_killed_and_replaced_and_a_pool_is_resized(
    on_ray: asyncio.Runner,
) -> None:
    async def main() -> None:
        settings = {"count": 1, "cpus": 0.1, "call_seconds": 1.0, "watch_seconds": 0.2}
        pool, term = await start_on_ray(config("Synchronous", timeout_seconds=2.0, **settings))
        try:
            for hangs in ("hang 3600", "burn"):  # a thread that sleeps, C code that keeps the interpreter to itself
                first = await pid(pool.actors[0])
                with pytest.raises(RewardTimeoutError):
                    await score(term, hangs)
                assert await score(term, "4") == 4.0
                assert await pid(pool.actors[0]) != first
            with pytest.raises(RewardError, match="3 actors in a row did not survive"):
                await score(term, "die")
            await pool.resize(3)
            assert await asyncio.gather(*(score(term, str(n)) for n in range(9))) == [float(n) for n in range(9)]
            under_way = [asyncio.create_task(score(term, "hang 0.5")) for _ in range(6)]
            await asyncio.sleep(0.1)
            await pool.resize(1)
            assert await asyncio.gather(*under_way) == [1.0] * 6
            assert len(pool.actors) == 1
            assert await score(term, "5") == 5.0
        finally:
            await pool.close()

    on_ray.run(main())


SEED = 20250
BLOWS = [signal.SIGKILL] * 5 + [signal.SIGSTOP] * 2
LEAST_GRADINGS = 300


async def torment(pool: ActorPool, dice: random.Random) -> None:
    """Strike actors at random until every blow has landed."""
    blows = dice.sample(BLOWS, len(BLOWS))
    while blows:
        await asyncio.sleep(dice.uniform(0.2, 1.0))
        with contextlib.suppress(ActorError, ProcessLookupError):  # that one lies on the floor already
            os.kill(await dice.choice(pool.actors).call("pid", seconds=1), blows[-1])
            blows.pop()


async def grade_until(term: RewardTerm, enough: Callable[[int], bool]) -> list[tuple[str, str, float, float]]:
    """24 gradings at a time: what was ordered, what came of it, the score less the right one, the seconds."""
    dice, results = random.Random(SEED + 1), list[tuple[str, str, float, float]]()

    async def one_after_the_other() -> None:
        while not enough(len(results)):
            kind = dice.choices(["score", "sleep", "raise"], weights=[6, 3, 1])[0]
            right = float(dice.randrange(1, 10**6)) if kind == "score" else 1.0
            response = {"score": f"{right}", "sleep": f"sleep {dice.uniform(0, 0.3):.2f}", "raise": "raise no"}[kind]
            begin = time.monotonic()
            try:
                status, off = "ok", await score(term, response) - right
            except RewardError as error:
                status, off = error.status, 0.0
            results.append((kind, status, off, time.monotonic() - begin))
            await asyncio.sleep(dice.uniform(0, 0.5))

    await asyncio.gather(*(one_after_the_other() for _ in range(24)))
    return results


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_on_ray_every_grading_ends_in_time_while_actors_are_killed_and_stopped_at_random(
    on_ray: asyncio.Runner,
) -> None:
    timeout_seconds, wait_seconds = 3.0, 60.0
    settings = {"count": 2, "cpus": 0.1, "max_sessions": 8, "call_seconds": 1.0, "watch_seconds": 0.2}
    settings["start_seconds"] = 30.0  # an actor that is stopped while it starts is not taken for hung before

    async def main() -> None:
        reward = config(timeout_seconds=timeout_seconds, wait_seconds=wait_seconds, **settings)
        pool, term = await start_on_ray(reward)
        first = [await pid(actor) for actor in pool.actors]
        tormentor = asyncio.create_task(torment(pool, random.Random(SEED)))
        try:
            results = await grade_until(term, lambda number: number >= LEAST_GRADINGS and tormentor.done())
            await tormentor
            counts = Counter((kind, status) for kind, status, _, _ in results)
            assert all(seconds < wait_seconds + 3 * (timeout_seconds + 5) for _, _, _, seconds in results), counts
            assert not any(off for _, _, off, _ in results), "a score that the reward did not give"
            assert ("raise", "ok") not in counts
            assert counts["score", "ok"] > counts.total() / 3, counts
            assert set(first).isdisjoint([await pid(actor) for actor in pool.actors])
            whole = await asyncio.gather(*(score(term, str(number)) for number in range(16)))
            assert whole == [float(number) for number in range(16)]
            assert await asyncio.gather(*(actor.call("num_sessions", seconds=5) for actor in pool.actors)) == [0, 0]
        finally:
            tormentor.cancel()
            await pool.close()

    on_ray.run(main())
