"""The fleet with workers in this process: work is given out and again, workers are watched, replaced, more or fewer."""

import asyncio
from typing import Any

import pytest

from rlsys.errors import ActorDiedError, ActorError, ConfigError, EngineDiedError, FleetLostError
from rlsys.types import Problem, RolloutGroup
from rlsys.workers import WorkerState
from tests.rlsys.fleet_here import FakeFleet, FakeWorker, never, running


def slow(worker: FakeWorker) -> None:
    worker.seconds = 0.1


def test_groups_are_spread_evenly_and_no_worker_has_more_than_its_share_in_flight() -> None:
    fleet = FakeFleet(slow, count=3)

    async def test() -> None:
        await asyncio.gather(*(fleet.roll(number, size=2) for number in range(18)))
        assert [len(fake.groups) for fake in fleet.fakes] == [6, 6, 6]
        assert max(fake.most_running for fake in fleet.fakes) <= 2 * 4

    running(fleet, test)


def test_what_does_not_fit_waits_its_turn() -> None:
    fleet = FakeFleet(slow, count=1)

    async def test() -> None:
        tasks = [asyncio.create_task(fleet.roll(number, size=4)) for number in range(5)]
        await asyncio.sleep(0.02)
        assert fleet.fakes[0].groups == ["g0", "g1"]
        assert fleet.dispatch.num_waiting == 12
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert fleet.fakes[0].groups == ["g0", "g1", "g2", "g4"]
        assert fleet.roster.workers["rollout actor 0"].in_flight == 0

    running(fleet, test)


def test_the_groups_of_a_worker_that_dies_go_to_the_others_and_it_is_replaced() -> None:
    fleet = FakeFleet(slow)

    async def test() -> None:
        tasks = [asyncio.create_task(fleet.roll(number)) for number in range(6)]
        await asyncio.sleep(0.03)
        fleet.fakes[0].kill()
        groups = await asyncio.gather(*tasks)
        assert [group.problem.id for group in groups] == list("012345")
        assert fleet.num_redispatched == 3
        assert sorted(fleet.fakes[1].groups[3:]) == ["g0-again-1", "g2-again-1", "g4-again-1"]
        await fleet.until(lambda: len(fleet.roster.serving) == 2)
        assert [worker.name for worker in fleet.roster.serving] == ["rollout actor 1", "rollout actor 2"]

    running(fleet, test)


def test_an_idle_worker_that_hangs_is_noticed_killed_and_replaced() -> None:
    fleet = FakeFleet()

    async def test() -> None:
        fleet.fakes[1].does["pulse"] = never
        await fleet.until(lambda: fleet.fakes[1].dead)
        await fleet.until(lambda: len(fleet.roster.serving) == 2)
        assert any("did not answer" in what for _, name, what in fleet.events if name == "rollout actor 1")

    running(fleet, test)


def test_an_engine_that_answers_but_writes_no_token_is_given_up() -> None:
    async def stuck() -> dict[str, float]:
        return {"tokens": 17.0, "running": 1.0}

    def prepare(worker: FakeWorker) -> None:
        if worker.number == 0:
            worker.does |= {"pulse": stuck, "act": never}

    fleet = FakeFleet(prepare, count=1)

    async def test() -> None:
        group = await fleet.roll()
        assert group.dropped == {}
        assert fleet.fakes[0].dead
        assert fleet.fakes[1].groups == ["g0-again-1"]
        assert any("has written no token" in what for _, _, what in fleet.events)

    running(fleet, test)


def test_an_engine_that_waits_for_a_tool_or_for_weights_is_not_given_up() -> None:
    async def waits() -> dict[str, float]:
        return {"tokens": 17.0, "running": 0.0}

    async def frozen() -> dict[str, float]:
        return {"tokens": 17.0, "running": 3.0}

    fleet = FakeFleet(count=2)

    async def test() -> None:
        fleet.frozen = True
        fleet.fakes[0].does["pulse"], fleet.fakes[1].does["pulse"] = waits, frozen
        await asyncio.sleep(0.5)
        assert not any(fake.dead for fake in fleet.fakes)
        fleet.doubt(["rollout actor 1"], "a transfer failed")  # its engine stays paused until it is synced
        fleet.frozen = False
        await asyncio.sleep(0.5)
        assert not any(fake.dead for fake in fleet.fakes)

    running(fleet, test)


def test_a_worker_that_has_lost_its_engine_is_given_up_at_once() -> None:
    async def no_engine(*_: Any, **__: Any) -> RolloutGroup:
        raise EngineDiedError("the engine's own process has ended")

    fleet = FakeFleet(lambda worker: worker.does.update(act=no_engine) if worker.number == 0 else None)

    async def test() -> None:
        await asyncio.gather(*(fleet.roll(number) for number in range(4)))
        assert fleet.fakes[0].calls["act"] == 2
        assert fleet.fakes[0].dead
        assert not fleet.fakes[0].closed

    running(fleet, test)


def test_a_problem_that_no_worker_survives_is_quarantined_with_its_reason() -> None:
    def prepare(worker: FakeWorker) -> None:
        async def dies(*_: Any, **keywords: Any) -> RolloutGroup:
            if keywords["group_id"].startswith("g13"):
                worker.kill()
                raise ActorDiedError("died of 13")
            return await worker.on_act(*_, **keywords)

        worker.does["act"] = dies

    fleet = FakeFleet(prepare, attempts=3)

    async def test() -> None:
        groups = await asyncio.gather(*(fleet.roll(number, size=2) for number in (12, 13, 14)))
        assert [group.dropped for group in groups] == [{}, {"quarantined: rollout actor 2 died during act": 2}, {}]
        assert sum(fake.dead for fake in fleet.fakes) == 3
        assert any("problem 13 is quarantined" in what for _, _, what in fleet.events)

    running(fleet, test)


def test_a_problem_on_which_the_actor_fails_is_tried_elsewhere_and_kills_nobody() -> None:
    async def raises(*_: Any, **__: Any) -> RolloutGroup:
        raise ActorError("act raised KeyError: 'x'")

    fleet = FakeFleet(lambda worker: worker.does.update(act=raises))

    async def test() -> None:
        group = await fleet.roll(size=4)
        assert group.dropped == {"quarantined: act raised KeyError: 'x'": 4}
        assert not any(fake.dead for fake in fleet.fakes)

    running(fleet, test)


def test_without_any_worker_a_run_waits_so_long_and_then_ends_with_a_reason() -> None:
    fleet = FakeFleet(lambda worker: worker.does.update(start=never) if worker.number else None, count=1)

    async def test() -> None:
        fleet.fakes[0].kill()
        with pytest.raises(
            FleetLostError, match=r"no rollout worker has served for .*of 1 wanted there are: 1 starting"
        ):
            await fleet.roll()

    running(fleet, test)


def test_workers_that_cannot_start_again_end_a_run_before_it_has_waited_to_the_end() -> None:
    async def broken() -> str:
        raise ActorError("no GPU is free")

    def prepare(worker: FakeWorker) -> None:
        if worker.number:
            worker.does["start"] = broken

    fleet = FakeFleet(prepare, count=1, wait_seconds=1000.0)

    async def test() -> None:
        fleet.fakes[0].kill()
        with pytest.raises(FleetLostError, match=r"3 rollout workers in a row could not start .*no GPU is free"):
            await fleet.roll()

    running(fleet, test)


def test_a_worker_for_which_there_is_no_node_is_tried_again_until_there_is_one() -> None:
    def prepare(worker: FakeWorker) -> None:
        if 1 < worker.number < 7:
            worker.does["start"] = never

    fleet = FakeFleet(prepare, count=2, start_seconds=0.05)

    async def test() -> None:
        fleet.fakes[0].kill()
        there = ["rollout actor 1", "rollout actor 7"]
        await fleet.until(lambda: [worker.name for worker in fleet.roster.serving] == there)

    running(fleet, test)


def test_a_first_worker_that_cannot_start_fails_the_start_with_its_own_message() -> None:
    async def broken() -> str:
        raise ActorError("the model has no config.json")

    fleet = FakeFleet(lambda worker: worker.does.update(start=broken) if worker.number else None)

    async def main() -> None:
        with pytest.raises(ActorError, match=r"no config\.json"):
            await fleet.started()
        await fleet.close()
        assert all(fake.dead for fake in fleet.fakes)

    asyncio.run(main())


def test_more_workers_serve_and_fewer_finish_what_they_have() -> None:
    fleet = FakeFleet(slow, count=1)

    async def test() -> None:
        await fleet.resize(3)
        await fleet.until(lambda: len(fleet.roster.serving) == 3)
        tasks = [asyncio.create_task(fleet.roll(number)) for number in range(3)]
        await asyncio.sleep(0.03)
        await fleet.resize(1)
        await asyncio.gather(*tasks)
        assert fleet.num_redispatched == 0
        await fleet.until(lambda: len(fleet.roster.workers) == 1)
        assert [fake.closed for fake in fleet.fakes] == [False, True, True]

    running(fleet, test)


def test_a_worker_whose_node_is_to_be_taken_away_finishes_what_it_has_while_another_one_starts() -> None:
    fleet = FakeFleet(count=2)

    async def test() -> None:
        for fake in fleet.fakes:
            fake.seconds = 0.2
        rolls = [asyncio.create_task(fleet.roll(number)) for number in range(4)]
        await fleet.until(lambda: all(fake.groups for fake in fleet.fakes))
        leaving = fleet.fakes[0]

        async def warned() -> dict[str, float]:
            return {**await leaving.on_pulse(), "leaving": 1.0}

        leaving.does["pulse"] = warned
        await fleet.until(lambda: len(fleet.fakes) == 3)
        given = list(leaving.groups)
        await asyncio.gather(*rolls, fleet.roll(4), fleet.roll(5))
        assert leaving.groups == given, "nothing more was given to it"
        await fleet.until(lambda: leaving.closed)
        assert fleet.num_redispatched == 0
        assert [worker.name for worker in fleet.roster.serving] == ["rollout actor 1", "rollout actor 2"]

    running(fleet, test)


def test_a_worker_that_is_to_leave_and_does_not_come_to_an_end_gives_its_problems_back() -> None:
    def prepare(worker: FakeWorker) -> None:
        worker.seconds = 3600.0 if worker.number else 0.2

    fleet = FakeFleet(prepare, drain_seconds=0.1, attempts=1)

    async def test() -> None:
        tasks = [asyncio.create_task(fleet.roll(number)) for number in range(3)]
        await asyncio.sleep(0.03)
        await fleet.resize(1)
        await fleet.until(lambda: fleet.roster.workers["rollout actor 1"].state is WorkerState.DRAINING)
        groups = await asyncio.gather(*tasks)
        assert [group.dropped for group in groups] == [{}, {}, {}]
        assert fleet.fakes[0].groups == ["g0", "g2", "g1"]

    running(fleet, test)


def test_a_worker_that_is_not_yet_there_is_sent_away_without_waiting_for_it() -> None:
    fleet = FakeFleet(
        lambda worker: worker.does.update(start=never) if worker.number > 1 else None, start_seconds=3600.0
    )

    async def test() -> None:
        await fleet.resize(4)
        await fleet.until(lambda: len(fleet.fakes) == 4)
        await fleet.resize(2)
        await fleet.until(lambda: len(fleet.roster.workers) == 2)
        assert [fake.dead for fake in fleet.fakes] == [False, False, True, True]

    running(fleet, test)


def test_no_fleet_has_fewer_workers_than_one() -> None:
    fleet = FakeFleet()

    async def test() -> None:
        with pytest.raises(ConfigError, match=r"0 rollout workers are fewer than actors.min \(1\)"):
            await fleet.resize(0)

    running(fleet, test)


def test_with_a_maximum_the_fleet_follows_the_queue() -> None:
    fleet = FakeFleet(slow, count=1, max=3)

    async def test() -> None:
        tasks = [asyncio.create_task(fleet.roll(number, size=4)) for number in range(12)]
        await fleet.until(lambda: len(fleet.roster.serving) == 3)
        await asyncio.gather(*tasks)
        assert all(fake.groups for fake in fleet.fakes)

    running(fleet, test)


def test_a_worker_that_joins_after_others_learned_does_not_serve_old_weights() -> None:
    fleet = FakeFleet()

    async def test() -> None:
        fleet.follows_learner = True
        fleet.synced([actor.name for actor in fleet.receivers], 4)
        await fleet.resize(3)
        await fleet.until(lambda: [actor.name for actor in fleet.newcomers] == ["rollout actor 2"])
        await asyncio.gather(*(fleet.roll(number) for number in range(6)))
        assert fleet.fakes[2].groups == []
        fleet.synced(["rollout actor 2"], 4)
        await asyncio.gather(*(fleet.roll(number) for number in range(6)))
        assert fleet.fakes[2].groups

    running(fleet, test)


def test_siblings_that_are_spread_come_back_as_one_group_of_the_right_size() -> None:
    def prepare(worker: FakeWorker) -> None:
        async def act(problem: Problem, *, size: int, group_id: str, **_: Any) -> RolloutGroup:
            worker.groups.append(f"{group_id}:{size}")
            return RolloutGroup(problem=problem, rollouts=(), dropped={"tool_error": size})

        worker.does["act"] = act

    fleet = FakeFleet(prepare, count=3, siblings="spread")

    async def test() -> None:
        group = await fleet.roll(size=8)
        assert group.dropped == {"tool_error": 8}
        assert sorted(name for fake in fleet.fakes for name in fake.groups) == [
            "g0-part-0:3",
            "g0-part-1:3",
            "g0-part-2:2",
        ]
        assert [len(fake.groups) for fake in fleet.fakes] == [1, 1, 1]

    running(fleet, test)
