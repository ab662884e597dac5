"""Rollout workers that are killed, stopped, broken or struck in the middle of an update, on real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from faults import Fault

from rlsys.workers import WorkerState
from tests.chaos.world import World, check_groups, wait_for_end

POINTS = ("in_act", "in_generate", "in_pulse", "in_pause", "in_open", "mid_broadcast", "before_ack", "in_resume")


def victim_of(world: World) -> Any:
    """The process of the youngest worker."""
    return world.faults.processes("worker")[-1]


async def strike(world: World, number: signal.Signals) -> Any:
    victim = victim_of(world)
    os.kill(victim.pid, number)
    return victim


async def replaced(world: World, victim: Any, joined: int) -> None:
    """Another worker has come in the place of one that was struck, whose process is gone."""
    await world.until(lambda: world.fleet.roster.num_joined == joined + 1, "a new worker")
    await world.whole()
    await asyncio.to_thread(wait_for_end, [victim])


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.chaos)])
def test_an_idle_worker_that_is_struck_is_replaced_by_one_with_the_published_weights(
    world: World, number: signal.Signals
) -> None:
    async def main() -> None:
        joined = world.fleet.roster.num_joined
        victim = await strike(world, number)
        await replaced(world, victim, joined)
        check_groups(groups := await world.roll(range(8)), newest=world.version)
        versions = {int(version) for group in groups for r in group.rollouts for version in r.versions[r.loss_mask]}
        assert versions == {world.version}, "nobody wrote with the weights that it was started with"

    world.run(main())


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.chaos)])
def test_what_a_struck_worker_had_in_flight_is_rolled_out_elsewhere_and_nothing_is_lost(
    world: World, number: signal.Signals
) -> None:
    async def main() -> None:
        joined, before = world.fleet.roster.num_joined, world.fleet.num_redispatched
        rolling = asyncio.create_task(world.roll(range(8)))
        await asyncio.sleep(0.1)
        assert all(worker.in_flight for worker in world.fleet.roster.workers.values())
        victim = await strike(world, number)
        check_groups(groups := await rolling, newest=world.version)
        assert [group.problem.id for group in groups] == [f"p{number}" for number in range(8)]
        assert world.fleet.num_redispatched > before
        await replaced(world, victim, joined)

    world.run(main())


@pytest.mark.parametrize("point", [pytest.param("in_pulse", marks=pytest.mark.chaos), "in_generate"])
def test_an_engine_that_ends_under_its_actor_takes_the_actor_with_it(world: World, point: str) -> None:
    async def main() -> None:
        joined, victim, struck = world.fleet.roster.num_joined, victim_of(world), len(world.faults.struck)
        name = list(world.fleet.roster.workers)[-1]
        world.faults.order(Fault(point=point, action="engine_dies", who=f"worker {name.split()[-1]}"))
        check_groups(await world.roll(range(8)), newest=world.version)
        await replaced(world, victim, joined)
        assert len(world.faults.struck) == struck + 1
        told = [what for _, who, what in world.fleet.events if who == name]
        assert "has ended" in told[-1], "the reason is the engine's end"

    world.run(main())


@pytest.mark.chaos
def test_an_engine_that_answers_but_writes_no_token_is_killed_and_its_groups_are_whole(world: World) -> None:
    async def main() -> None:
        joined = world.fleet.roster.num_joined
        world.faults.order(Fault(point="in_generate", action="hang", spared=3))
        check_groups(await world.roll(range(8)), newest=world.version)
        await world.until(lambda: world.fleet.roster.num_joined == joined + 1, "a new worker")
        assert any("no token" in what for _, _, what in world.fleet.events)

    world.run(main())


@pytest.mark.parametrize(
    ("point", "action"),
    [
        ("mid_broadcast", "kill"),
        ("before_ack", "raise"),
        *(
            pytest.param(point, action, marks=pytest.mark.chaos)
            for point in ("in_pause", "mid_broadcast", "before_ack", "in_resume", "in_open")
            for action in ("kill", "raise")
            if (point, action) not in (("mid_broadcast", "kill"), ("before_ack", "raise"))
        ),
    ],
)
def test_weights_arrive_at_all_others_when_a_worker_is_struck_during_the_update(
    world: World, point: str, action: Any
) -> None:
    async def main() -> None:
        joined, struck = world.fleet.roster.num_joined, len(world.faults.struck)
        if point == "in_open":  # workers meet only where their number has changed
            await strike(world, signal.SIGKILL)
            await world.until(lambda: world.fleet.roster.num_joined == joined + 1, "a new worker")
            joined += 1
        name = list(world.fleet.roster.workers)[-1]
        world.faults.order(Fault(point=point, action=action, who=f"worker {name.split()[-1]}"))
        rolling = asyncio.create_task(world.roll(range(8)))
        await asyncio.sleep(0.05)
        if point == "in_open":
            await world.until(lambda: len(world.faults.struck) > struck, "the fault")
        await world.publish()
        groups = await rolling
        check_groups(groups, newest=world.version)
        await world.whole()
        check_groups(await world.roll(range(8, 16)), newest=world.version)
        assert world.faults.struck[struck:] == [f"worker {name.split()[-1]}: {action} at {point}"]
        assert world.fleet.roster.num_joined == joined + (action == "kill")

    world.run(main())


@pytest.mark.chaos
@pytest.mark.parametrize("point", ["mid_broadcast", "in_pause"])
def test_a_worker_that_hangs_during_the_update_is_given_up_at_a_deadline_and_the_others_get_their_weights(
    world: World, point: str
) -> None:
    async def main() -> None:
        name = list(world.fleet.roster.workers)[-1]
        world.faults.order(Fault(point=point, action="stop", who=f"worker {name.split()[-1]}"))
        await world.publish()
        assert (WorkerState.HEALTHY, world.version) in world.states()
        await world.whole()
        assert name not in world.fleet.roster.workers

    world.run(main())


@pytest.mark.chaos
def test_a_problem_that_crashes_every_engine_is_quarantined_and_its_neighbours_are_whole(world: World) -> None:
    async def main() -> None:
        joined = world.fleet.roster.num_joined
        attempts = world.config.actors.attempts
        world.faults.order(Fault(point="in_act", action="kill", what="p3", times=attempts))
        (before, sick, after) = await world.roll([2, 3, 4])
        check_groups([before, after], newest=world.version)
        assert sick.rollouts == ()
        ((reason, count),) = sick.dropped.items()
        assert reason.startswith("quarantined: ")
        assert "died" in reason
        assert count == 2
        await world.whole()
        assert world.fleet.roster.num_joined == joined + attempts

    world.run(main())


def test_a_group_whose_answer_is_lost_is_rolled_out_again_and_comes_once(world: World) -> None:
    async def main() -> None:
        world.faults.order(Fault(point="before_answer", action="kill", what="p5"))
        groups = await world.roll(range(8))
        check_groups(groups, newest=world.version)
        assert [group.problem.id for group in groups] == [f"p{number}" for number in range(8)]

    world.run(main())


@pytest.mark.chaos
def test_after_all_workers_were_killed_at_once_others_take_their_place_and_do_all_the_work(world: World) -> None:
    async def main() -> None:
        joined = world.fleet.roster.num_joined
        rolling = asyncio.create_task(world.roll(range(8)))
        await asyncio.sleep(0.1)
        for process in world.faults.processes("worker"):
            os.kill(process.pid, signal.SIGKILL)
        check_groups(await rolling, newest=world.version)
        await world.whole()
        assert world.fleet.roster.num_joined == joined + 2

    world.run(main())


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
def test_whatever_strikes_whomever_every_group_comes_back_whole(world: World, seed: int) -> None:
    async def main() -> None:
        joined = world.fleet.roster.num_joined
        world.faults.order_any(seed, 4, points=POINTS, actions=["kill", "stop", "raise", "hang", "engine_dies"])
        published = world.version
        for first in range(0, 40, 8):
            rolling = asyncio.create_task(world.roll(range(first, first + 8)))
            await asyncio.sleep(0.1)
            await world.publish()
            for group in await rolling:
                assert len(group.rollouts) + sum(group.dropped.values()) == 2
                assert not group.dropped or next(iter(group.dropped)).startswith("quarantined: ")
        assert world.version == published + 5
        assert world.fleet.roster.num_joined <= joined + 5

    world.run(main())
