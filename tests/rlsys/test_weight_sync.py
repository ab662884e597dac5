"""Weights on their way from learner ranks to workers, in this process: who has them, who has not, who is given up."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rlsys.errors import ActorError, FleetLostError, LearnerLostError, WeightSyncError
from rlsys.shared_weights import SharedPlace
from rlsys.weight_sync import WeightSync, serve_newcomers
from rlsys.weights import WeightPlan
from rlsys.workers import WorkerState
from tests.rlsys.fleet_here import FakeFleet, FakeWorker, never, running

PLAN = WeightPlan(names=["a", "b"], dtype_names=["float32", "float32"], shapes=[[2], [3]])


class FakeRank(FakeWorker):
    """A learner rank; rank 0 knows what it sends."""

    async def on_rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 1000 + self.calls["rendezvous"]

    async def on_send_weights(self) -> dict[str, int]:
        return {"a": 7, "b": 7} if self.number == 0 else {}

    async def on_published_weights(self) -> SharedPlace | None:
        return None

    async def on_leave_weights(self) -> None:
        return None


class FakeLearner:
    """What joins the weights of ranks with a fleet, without anything that learns."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.ranks = [FakeRank(0), FakeRank(1)]
        self.sync = WeightSync(self.ranks, PLAN, fleet, fleet.settings)  # type: ignore[arg-type]
        self.at_rest = asyncio.Lock()
        self.is_ahead = True

    async def publish(self, fleet: FakeFleet, version: int) -> dict[str, float]:
        async with self.at_rest:
            seconds = await self.sync.publish(lambda: fleet.receivers, version)
            self.is_ahead = False
        fleet.bell.ring()
        return seconds


def synced_by(fleet: FakeFleet, test: Callable[[FakeLearner], Awaitable[None]]) -> None:
    async def with_learner() -> None:
        learner = FakeLearner(fleet)
        fleet.follows_learner = True
        newcomers = asyncio.create_task(serve_newcomers(learner.sync, fleet, learner))
        try:
            await test(learner)
        finally:
            newcomers.cancel()
            await asyncio.gather(newcomers, return_exceptions=True)

    running(fleet, with_learner)


def versions(fleet: FakeFleet) -> list[int]:
    return [worker.version for worker in fleet.roster.serving]


def test_learner_and_workers_meet_once_for_as_long_as_nobody_comes_or_goes() -> None:
    fleet = FakeFleet(count=3)

    async def test(learner: FakeLearner) -> None:
        for version in (1, 2, 3):
            await learner.publish(fleet, version)
            assert versions(fleet) == [version] * 3
        assert learner.sync.epoch == 1
        assert [fake.calls["open_weights"] for fake in fleet.fakes] == [1, 1, 1]

    synced_by(fleet, test)


def test_a_worker_that_joins_gets_the_published_weights_without_a_pause_for_the_others() -> None:
    fleet = FakeFleet(count=1)

    async def test(learner: FakeLearner) -> None:
        await learner.publish(fleet, 5)
        await fleet.resize(2)
        await fleet.until(lambda: versions(fleet) == [5, 5])
        assert [fake.calls["pause"] for fake in fleet.fakes] == [1, 1]
        assert fleet.fakes[1].version == 5
        await learner.publish(fleet, 6)
        assert versions(fleet) == [6, 6]
        assert learner.sync.epoch == 3

    synced_by(fleet, test)


def test_a_worker_that_joins_while_the_learner_is_ahead_waits_for_the_next_version() -> None:
    fleet = FakeFleet(count=1)

    async def test(learner: FakeLearner) -> None:
        await learner.publish(fleet, 1)
        learner.is_ahead = True
        await fleet.resize(2)
        await fleet.until(lambda: len(fleet.newcomers) == 1)
        await asyncio.sleep(0.05)
        assert versions(fleet) == [1]
        await learner.publish(fleet, 2)
        assert versions(fleet) == [2, 2]

    synced_by(fleet, test)


async def shares() -> SharedPlace:
    return SharedPlace(process=1, descriptors=(3, 4), token=5, serial=6)


def test_a_worker_that_joins_on_the_learners_host_reads_the_published_weights_while_the_learner_trains() -> None:
    fleet = FakeFleet(count=1)

    async def test(learner: FakeLearner) -> None:
        learner.ranks[0].does["published_weights"] = shares
        await learner.publish(fleet, 1)
        learner.is_ahead = True
        async with learner.at_rest:
            await fleet.resize(2)
            await fleet.until(lambda: versions(fleet) == [1, 1])
        assert learner.sync.epoch == 1
        assert learner.ranks[0].calls["send_weights"] == 1
        await learner.publish(fleet, 2)
        assert versions(fleet) == [2, 2]

    synced_by(fleet, test)


async def elsewhere(_: WeightPlan, *, published: SharedPlace | None = None) -> dict[str, int]:
    if published is not None:
        raise WeightSyncError("the learner's shared memory cannot be opened from here")
    return {"a": 7, "b": 7}


async def damaged(_: WeightPlan, *, published: SharedPlace | None = None) -> dict[str, int]:
    return {"a": 7, "b": 7 if published is None else 8}


@pytest.mark.parametrize("receive", [elsewhere, damaged])
def test_a_worker_that_cannot_read_the_published_weights_is_given_them(receive: Callable[..., Awaitable[Any]]) -> None:
    fleet = FakeFleet(count=1)

    async def test(learner: FakeLearner) -> None:
        learner.ranks[0].does["published_weights"] = shares
        await learner.publish(fleet, 1)
        fleet._prepare = lambda worker: worker.does.update(receive_weights=receive)
        learner.is_ahead = True
        await fleet.resize(2)
        await fleet.until(lambda: bool(fleet.newcomers))
        await fleet.until(lambda: fleet.fakes[1].calls["receive_weights"] == 1)
        await asyncio.sleep(0.05)
        assert versions(fleet) == [1]
        learner.is_ahead = False
        fleet.bell.ring()
        await fleet.until(lambda: versions(fleet) == [1, 1])
        assert fleet.fakes[1].calls["receive_weights"] == 2

    synced_by(fleet, test)


@pytest.mark.parametrize("method", ["pause", "open_weights", "receive_weights", "resume"])
def test_a_worker_that_dies_in_any_part_of_an_update_does_not_keep_the_others_from_it(method: str) -> None:
    fleet = FakeFleet(count=3)

    async def test(learner: FakeLearner) -> None:
        async def dies(*_: Any, **__: Any) -> None:
            fleet.fakes[1].kill()
            await never()

        fleet.fakes[1].does[method] = dies
        await learner.publish(fleet, 1)
        assert {worker.name: worker.version for worker in fleet.roster.serving}.items() >= {
            "rollout actor 0": 1,
            "rollout actor 2": 1,
        }.items()
        await fleet.until(lambda: versions(fleet) == [1, 1, 1])
        assert fleet.roster.serving[-1].name == "rollout actor 3"

    synced_by(fleet, test)


def test_a_worker_that_hangs_in_an_update_is_given_up_by_the_watch_long_before_the_deadline() -> None:
    fleet = FakeFleet(count=2, sync_seconds=600.0)

    async def test(learner: FakeLearner) -> None:
        fleet.fakes[0].does |= {"receive_weights": never, "pulse": never}
        await learner.publish(fleet, 1)
        assert fleet.fakes[0].dead
        assert learner.ranks[0].calls["leave_weights"] == 1
        await fleet.until(lambda: versions(fleet) == [1, 1])

    synced_by(fleet, test)


def test_the_others_do_not_wait_for_a_transfer_that_one_of_them_has_spoilt() -> None:
    fleet = FakeFleet(count=2, sync_seconds=600.0)

    async def test(learner: FakeLearner) -> None:
        left = asyncio.Event()

        async def leaves() -> None:
            left.set()

        async def waits(plan: WeightPlan) -> dict[str, int]:
            if fleet.fakes[1].calls["receive_weights"] == 1:
                await left.wait()
                raise ActorError("the connection was closed")
            return await fleet.fakes[1].on_receive_weights(plan)

        async def spoils(plan: WeightPlan) -> dict[str, int]:
            if fleet.fakes[0].calls["receive_weights"] == 1:
                raise ActorError("out of memory")
            return await fleet.fakes[0].on_receive_weights(plan)

        learner.ranks[0].does["leave_weights"] = leaves
        fleet.fakes[0].does["receive_weights"], fleet.fakes[1].does["receive_weights"] = spoils, waits
        await learner.publish(fleet, 1)
        assert versions(fleet) == [1, 1]
        assert learner.sync.num_failures == 1
        assert learner.sync.epoch == 2

    synced_by(fleet, test)


def test_workers_that_die_one_after_another_do_not_use_up_the_tries_of_the_others() -> None:
    fleet = FakeFleet(count=5)

    async def test(learner: FakeLearner) -> None:
        def dies_in_try(number: int) -> Callable[..., Awaitable[Any]]:
            async def receive(plan: WeightPlan) -> dict[str, int]:
                if fleet.fakes[number].calls["receive_weights"] > number:
                    fleet.fakes[number].kill()
                    await never()
                return await fleet.fakes[number].on_receive_weights(plan)

            return receive

        for number in range(4):
            fleet.fakes[number].does["receive_weights"] = dies_in_try(number)
        await learner.publish(fleet, 1)
        assert learner.sync.num_failures == 4
        await fleet.until(lambda: versions(fleet) == [1] * 5)
        assert [fake.dead for fake in fleet.fakes[:5]] == [True] * 4 + [False]

    synced_by(fleet, test)


def test_a_fleet_in_which_every_new_worker_dies_of_the_weights_is_an_error_before_long() -> None:
    async def dies(one: FakeWorker) -> None:
        one.kill()
        await never()

    fleet = FakeFleet(lambda one: one.does.update(receive_weights=lambda *_: dies(one)), count=2)

    async def test(learner: FakeLearner) -> None:
        with pytest.raises(ActorError, match=r"died during receive_weights"):
            await learner.publish(fleet, 1)
        assert learner.sync.num_failures <= 2 + 3

    synced_by(fleet, test)


def test_what_was_not_proved_is_sent_again_and_after_three_times_nobody_serves() -> None:
    fleet = FakeFleet(count=2)

    async def test(learner: FakeLearner) -> None:
        await learner.publish(fleet, 1)

        async def wrong(plan: WeightPlan) -> dict[str, int]:
            return {**await fleet.fakes[1].on_receive_weights(plan), "b": 8}

        fleet.fakes[1].does["receive_weights"] = wrong
        with pytest.raises(
            WeightSyncError, match=r"rollout actor 1 holds a different b than the learner sent as version 2"
        ):
            await learner.publish(fleet, 2)
        assert learner.sync.num_failures == 3
        assert [worker.state for worker in fleet.roster.workers.values()] == [WorkerState.STALE] * 2
        assert [fake.version for fake in fleet.fakes] == [1, 1]

    synced_by(fleet, test)


def test_a_newcomer_that_never_takes_the_weights_is_replaced_by_one_that_does() -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise ActorError("no room for the weights")

    fleet = FakeFleet(lambda one: one.does.update(receive_weights=broken) if one.number == 1 else None, count=1)

    async def test(learner: FakeLearner) -> None:
        await learner.publish(fleet, 1)
        await fleet.resize(2)
        await fleet.until(
            lambda: [worker.name for worker in fleet.roster.serving] == ["rollout actor 0", "rollout actor 2"]
        )

    synced_by(fleet, test)


def test_a_rank_that_dies_or_hangs_is_an_error_of_the_learner_and_no_workers_fault() -> None:
    fleet = FakeFleet(count=2)

    async def test(learner: FakeLearner) -> None:
        async def dies() -> None:
            learner.ranks[1].kill()
            await never()

        learner.ranks[1].does["send_weights"] = dies
        with pytest.raises(LearnerLostError, match=r"rollout actor 1 died during send_weights"):
            await learner.publish(fleet, 1)
        assert not any(fake.dead for fake in fleet.fakes)

    synced_by(fleet, test)


def test_publishing_waits_for_a_worker_and_not_for_ever() -> None:
    fleet = FakeFleet(lambda one: one.does.update(start=never) if one.number else None, count=1)

    async def test(learner: FakeLearner) -> None:
        fleet.fakes[0].kill()
        await fleet.until(lambda: not fleet.receivers)
        with pytest.raises(FleetLostError, match=r"no rollout worker came to take new weights for 0\.5 s"):
            await learner.publish(fleet, 1)

    synced_by(fleet, test)
