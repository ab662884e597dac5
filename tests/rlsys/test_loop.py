"""The training loop: how stale a group may be, in which order groups are trained, and how it ends."""

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys import loop
from rlsys.errors import TrainingStalledError
from rlsys.ledger import Ledger
from rlsys.loop import Loop
from rlsys.types import Problem, Rollout, RolloutGroup

PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

MESSAGE = {"role": "user", "content": "?"}


@dataclass
class World:
    """A fake actor and a fake learner that write down what happens; time is counted in turns of the event loop."""

    turns: Callable[[int], int] = lambda _: 0
    """How long it takes to act on the problem with this number."""
    learn_turns: int = 0
    drop: Callable[[int], str | None] = lambda _: None
    version: int = 0
    """What the engines write with."""
    at_groups: bool = False
    is_generating: Callable[[], bool] = lambda: True
    written_by: Callable[[int, int, int], set[int]] = lambda _number, _attempt, version: {version}
    """Given number, attempt and the version at the end: the versions that a group's tokens name besides the first."""
    attempts: dict[int, int] = field(default_factory=dict)
    trained: list[list[int]] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    versions: list[set[int]] = field(default_factory=list)
    drops: list[dict[str, int]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    in_flight: int = 0
    most_in_flight: int = 0
    acting_while_learning: bool = False
    cancelled: int = 0

    async def act(self, number: int, attempt: int) -> RolloutGroup:
        assert attempt == self.attempts.get(number, 0) + 1
        self.attempts[number] = attempt
        began = self.version
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            for _ in range(self.turns(number)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        versions = np.array(sorted({began} | self.written_by(number, attempt, self.version)), np.int32)
        rollout = Rollout(
            tokens=np.zeros(len(versions), np.int32),
            loss_mask=np.ones(len(versions), np.bool_),
            logprobs=np.zeros(len(versions), np.float32),
            versions=versions,
        )
        problem = Problem(id=str(number), prompt=(MESSAGE,), metadata={"began": began})
        return RolloutGroup(problem=problem, rollouts=(rollout,))

    async def learn(self, step: int, groups: Mapping[int, RolloutGroup]) -> None:
        assert step == self.version + 1
        assert [int(group.problem.id) for group in groups.values()] == list(groups)
        self.trained.append(list(groups))
        self.staleness += [self.version - group.problem.metadata["began"] for group in groups.values()]
        self.versions += [set(group.rollouts[0].versions.tolist()) for group in groups.values()]
        for _ in range(self.learn_turns):
            self.acting_while_learning |= self.in_flight > 0
            await asyncio.sleep(0)

    async def publish(self, step: int) -> None:
        assert self.ledger.step == step == self.version + 1
        if self.at_groups and self.is_generating():
            assert self.in_flight == 0
        self.drops.append(dict(self.ledger.dropped))
        await asyncio.sleep(0)
        self.version += 1

    def reason(self, number: int, group: RolloutGroup) -> str | None:
        assert int(group.problem.id) == number
        return self.drop(number)

    def loop(self, *, groups_per_step: int = 3, max_staleness: int = 0, max_skipped_groups: int = 50) -> Loop:
        return Loop(
            act=self.act,
            learn=self.learn,
            publish=self.publish,
            drop_reason=self.reason,
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            max_skipped_groups=max_skipped_groups,
            at_groups=self.at_groups,
            is_generating=self.is_generating,
        )


Beside = Callable[[asyncio.Event, "asyncio.Task[None]"], Awaitable[None]]


def run(
    world: World, *, steps: int = 5, numbers: Iterator[int] | None = None, beside: Beside | None = None, **options: int
) -> Ledger:
    """Run the world's loop with a deadline and see that it leaves no task behind, however it ends."""
    loop = world.loop(**options)

    async def main() -> Ledger:
        stop = asyncio.Event()
        before = asyncio.all_tasks()
        stream = itertools.count(world.ledger.last + 1) if numbers is None else numbers
        task = asyncio.create_task(loop.run(world.ledger, stream, steps=steps, stop=stop))
        try:
            async with asyncio.timeout(60):
                if beside is not None:
                    await beside(stop, task)
                await task
        finally:
            left = asyncio.all_tasks() - before - {task}
            assert not left, f"left behind: {left}"
            assert world.in_flight == 0
            assert world.ledger.conserved
        return world.ledger

    return asyncio.run(main())


def uneven(seed: int, longest: int) -> Callable[[int], int]:
    return lambda number: random.Random(seed * 1_000_003 + number).randrange(longest + 1)


# --- staleness -------------------------------------------------------------------------------------------------------


@PATIENT
@given(
    max_staleness=st.sampled_from([0, 1, 4]),
    groups_per_step=st.integers(1, 5),
    longest=st.sampled_from([0, 1, 7, 25]),
    learn_turns=st.sampled_from([0, 1, 20]),
    dropped=st.sampled_from([0.0, 0.3, 0.8]),
    at_groups=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_group_is_trained_by_a_policy_more_versions_newer_than_the_bound(
    max_staleness: int,
    groups_per_step: int,
    longest: int,
    learn_turns: int,
    dropped: float,
    at_groups: bool,
    seed: int,
) -> None:
    def drop(number: int) -> str | None:
        return "uninformative" if random.Random(seed + number * 7919).random() < dropped else None

    world = World(turns=uneven(seed, longest), learn_turns=learn_turns, drop=drop, at_groups=at_groups)
    sizes = {"groups_per_step": groups_per_step, "max_staleness": max_staleness}
    with patch.object(loop, "_LOOK_SECONDS", 3600.0):  # what it waits for wakes it
        ledger = run(world, steps=8, max_skipped_groups=1000, **sizes)
    assert max(world.staleness) <= max_staleness
    assert min(world.staleness) >= 0
    assert world.most_in_flight <= (max_staleness + 1) * groups_per_step
    order = [number for numbers in world.trained for number in numbers]
    assert order == [number for number in range(1, order[-1] + 1) if drop(number) is None], "in start order, none left"
    assert all(len(numbers) == groups_per_step for numbers in world.trained)
    assert ledger.trained == len(order)
    assert ledger.in_flight == ledger.done == 0, "towards the end nothing starts that is not trained"
    if at_groups:
        assert all(len(versions) == 1 for versions in world.versions), "one version writes a group"


@pytest.mark.parametrize("longest", [0, 5, 30])
def test_with_a_bound_of_zero_nothing_acts_while_the_learner_learns(longest: int) -> None:
    world = World(turns=uneven(1, longest), learn_turns=10)
    run(world, max_staleness=0, steps=6)
    assert set(world.staleness) == {0}
    assert not world.acting_while_learning
    assert world.trained == [[3 * step + 1, 3 * step + 2, 3 * step + 3] for step in range(6)]


@pytest.mark.parametrize("at_groups", [False, True])
@pytest.mark.parametrize("max_staleness", [1, 4])
def test_with_a_bound_above_zero_actors_go_on_while_the_learner_learns(max_staleness: int, at_groups: bool) -> None:
    world = World(turns=lambda _: 15, learn_turns=10, at_groups=at_groups)
    run(world, max_staleness=max_staleness, steps=12)
    assert world.acting_while_learning
    assert max(world.staleness) == max_staleness, "the room that the bound gives is used"


def test_groups_are_trained_in_the_order_in_which_they_started_not_in_which_they_ended() -> None:
    world = World(turns=lambda number: 30 if number % 3 == 1 else 0)
    run(world, max_staleness=1, steps=4)
    assert world.trained == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]


# --- when new weights arrive -----------------------------------------------------------------------------------------


def test_groups_that_are_under_way_go_on_with_new_weights_unless_updates_are_at_groups() -> None:
    world = World(turns=lambda number: 40 if number == 4 else 2)
    run(world, max_staleness=1, steps=3)
    assert world.versions[3] == {0, 1}
    strict = World(turns=lambda number: 40 if number == 4 else 2, at_groups=True)
    run(strict, max_staleness=1, steps=3)
    assert [versions for versions in strict.versions if len(versions) > 1] == []
    assert strict.trained == world.trained == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    # 1 to 6 began with version 0; only after the update due could 7 begin, with version 1.
    assert strict.versions == [{0}] * 6 + [{1}] * 3


def test_an_update_at_groups_does_not_wait_for_groups_that_nothing_writes() -> None:
    world = World(turns=lambda number: 10**9 if number > 3 else 0, at_groups=True, is_generating=lambda: False)

    async def beside(stop: asyncio.Event, _: "asyncio.Task[None]") -> None:
        while not world.version:
            await asyncio.sleep(0)
        assert world.in_flight == 3
        stop.set()

    assert run(world, max_staleness=1, steps=9, beside=beside).unsettled[:3] == [4, 5, 6]


def test_a_stop_while_an_update_waits_for_groups_ends_them_and_publishes() -> None:
    world = World(turns=lambda number: 10**9 if number > 3 else 0, at_groups=True)

    async def beside(stop: asyncio.Event, _: "asyncio.Task[None]") -> None:
        while world.ledger.step < 1:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert world.version == 0
        stop.set()

    ledger = run(world, max_staleness=1, steps=9, beside=beside)
    assert (ledger.step, world.version, ledger.unsettled) == (1, 1, [4, 5, 6])


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_group_that_is_newer_than_the_policy_is_counted_and_its_problem_comes_again_in_its_place() -> None:
    world = World(written_by=lambda number, attempt, _: {7} if (number, attempt) == (2, 1) else set())
    ledger = run(world, steps=2)
    assert world.trained == [[1, 2, 3], [4, 5, 6]]
    assert world.attempts[2] == 2
    assert ledger.discarded == Counter(newer_than_the_policy=1)
    assert (ledger.issued, ledger.trained, ledger.dropped) == (6, 6, Counter())


def test_a_group_that_is_too_stale_is_counted_and_its_problem_comes_again_within_the_bound() -> None:
    # As on a worker that missed updates: it names version 0 when the policy is at 2 or more.
    world = World(written_by=lambda number, attempt, _: {0} if number > 8 and attempt == 1 else set())
    ledger = run(world, steps=5, groups_per_step=2, max_staleness=1)
    assert [sorted(numbers) for numbers in world.trained] == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    assert ledger.discarded == Counter(too_stale=2)
    assert max(world.staleness) <= 1


def test_groups_that_are_at_fault_again_and_again_end_the_loop() -> None:
    world = World(written_by=lambda *_: {99})
    with pytest.raises(TrainingStalledError, match=r"10 groups in a row .*newer_than_the_policy"):
        run(world, max_skipped_groups=10)
    assert world.ledger.discarded == Counter(newer_than_the_policy=10)


@PATIENT
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 3]),
    st.lists(st.integers(0, 60), max_size=4),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
)
def test_from_any_saved_point_every_problem_is_trained_once_or_counted_as_dropped(
    seed: int, max_staleness: int, deaths: list[int], faults: float, at_groups: bool
) -> None:
    """The driver dies after so many turns, then goes on from what it saved after the last policy step."""
    chance = random.Random(seed)
    fates: dict[int, object] = {}
    saved = (json.dumps(Ledger().state()), dict(fates), 0)

    def drop(number: int) -> str | None:
        return "uninformative" if random.Random(seed + number * 7919).random() < 0.3 else None

    for turns in [*deaths, None]:
        state, fates, version = json.loads(saved[0]), dict(saved[1]), saved[2]
        world = World(
            turns=lambda _: chance.randrange(12),
            drop=drop,
            version=version,
            ledger=Ledger.restored(state),
            at_groups=at_groups,
            written_by=lambda *_: {10**6} if chance.random() < faults else set(),
        )
        world.attempts = dict(state["unsettled"])
        learn, reason, publish = world.learn, world.reason, world.publish

        async def learned(step: int, groups: Mapping[int, RolloutGroup], learn=learn, fates=fates) -> None:  # type: ignore[no-untyped-def]
            await learn(step, groups)
            assert fates.keys().isdisjoint(groups), "trained or dropped before"
            fates.update(dict.fromkeys(groups, step))

        def judged(number: int, group: RolloutGroup, reason=reason, fates=fates) -> str | None:  # type: ignore[no-untyped-def]
            why: str | None = reason(number, group)
            if why is not None:
                assert number not in fates
                fates[number] = why
            return why

        async def published(step: int, publish=publish, world=world, fates=fates) -> None:  # type: ignore[no-untyped-def]
            nonlocal saved
            await publish(step)
            saved = (json.dumps(world.ledger.state()), dict(fates), world.version)

        world.learn, world.reason, world.publish = learned, judged, published  # type: ignore[method-assign]

        async def killed(_: asyncio.Event, task: "asyncio.Task[None]", turns=turns) -> None:  # type: ignore[no-untyped-def]
            for _ in range(turns or 0):
                await asyncio.sleep(0)
            if turns is not None:
                task.cancel()

        try:
            run(world, steps=6, max_staleness=max_staleness, max_skipped_groups=1000, beside=killed)
        except asyncio.CancelledError:
            continue
    assert world.ledger.step == 6
    assert world.ledger.unsettled == []
    assert sorted(fates) == list(range(1, len(fates) + 1))
    assert Counter(fates.values()) == {**dict.fromkeys(range(1, 7), 3), **world.ledger.dropped}
    assert {number for number, why in fates.items() if isinstance(why, str)} == {n for n in fates if drop(n)}


def test_what_was_not_settled_comes_first_when_a_loop_goes_on() -> None:
    world = World(drop=lambda number: "dull" if number == 2 else None)
    world.ledger = Ledger.restored({**Ledger().state(), "last": 9, "issued": 3, "unsettled": [[2, 1], [5, 3], [9, 1]]})
    world.attempts = {2: 1, 5: 3, 9: 1}
    ledger = run(world, steps=2, groups_per_step=2)
    assert world.trained == [[5, 9], [10, 11]]
    assert (world.attempts[5], world.attempts[10]) == (4, 1)
    assert (ledger.issued, ledger.trained, ledger.dropped) == (5, 4, Counter(dull=1))


# --- drops -----------------------------------------------------------------------------------------------------------


def test_a_dropped_group_gives_its_slot_to_another() -> None:
    world = World(drop=lambda number: "uninformative" if number % 2 else None)
    ledger = run(world, steps=2)
    assert world.trained == [[2, 4, 6], [8, 10, 12]]
    assert world.drops == [{"uninformative": 3}, {"uninformative": 6}]
    assert (ledger.step, ledger.issued, ledger.dropped) == (2, 12, Counter(uninformative=6))


def test_drops_are_counted_by_the_kind_of_reason() -> None:
    world = World(drop=lambda number: {1: "too_long", 2: "reward_error: it was", 6: "too_long"}.get(number))
    run(world, groups_per_step=2, steps=3)
    assert world.drops == [{"too_long": 1, "reward_error": 1}, *[{"too_long": 2, "reward_error": 1}] * 2]


def test_an_endless_stream_of_groups_without_information_ends_with_an_error_that_says_so() -> None:
    world = World(drop=lambda _: "uninformative: truly")
    with pytest.raises(TrainingStalledError, match=r"20 groups in a row .*uninformative: truly.*rl\.group_size"):
        run(world, max_skipped_groups=20)
    assert len(world.attempts) < 20 + 10
    assert not world.trained


def test_groups_that_teach_something_in_between_start_the_count_anew() -> None:
    world = World(drop=lambda number: None if number % 10 == 1 else "uninformative")
    assert run(world, max_skipped_groups=10, steps=4).step == 4
    with pytest.raises(TrainingStalledError):
        run(World(drop=world.drop), max_skipped_groups=9, steps=4)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_no_group_starts_that_could_not_be_trained() -> None:
    world = World(turns=lambda number: 10**9 if number > 6 else 0)
    ledger = run(world, max_staleness=4, steps=2)
    assert (ledger.step, ledger.issued, ledger.unsettled) == (2, 6, [])


def test_an_actor_that_raises_ends_the_loop_with_its_error_and_cancels_the_others() -> None:
    world = World(turns=lambda number: 10**9 if number > 5 else 1)
    act = world.act

    async def failing(number: int, attempt: int) -> RolloutGroup:
        if number == 5 and world.version == 1:
            raise ValueError("the actor died")
        while number == 5 and world.version < 1:
            await asyncio.sleep(0)
        return await act(number, attempt)

    async def dying(number: int, attempt: int) -> RolloutGroup:
        while number == 5 and world.version < 1:
            await asyncio.sleep(0)
        return await failing(number, attempt)

    world.act = dying  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the actor died"):
        run(world, max_staleness=2, steps=9)
    assert world.trained == [[1, 2, 3]]
    assert world.cancelled > 0
    assert world.ledger.unsettled[:3] == [4, 5, 6]


def test_an_error_is_not_waited_for_behind_groups_that_never_end() -> None:
    world = World(turns=lambda _: 10**9)
    act = world.act

    async def failing(number: int, attempt: int) -> RolloutGroup:
        if number == 3:
            raise ValueError("the fleet is lost")
        return await act(number, attempt)

    world.act = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the fleet is lost"):
        run(world)


def test_an_actor_that_cancels_a_group_by_itself_is_an_error() -> None:
    async def cancelled(number: int, attempt: int) -> RolloutGroup:  # noqa: ARG001
        raise asyncio.CancelledError

    world = World()
    world.act = cancelled  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="cancelled by what rolls it out"):
        run(world)


def test_an_actor_that_raises_before_it_waits_ends_the_loop_as_well() -> None:
    world = World(drop=lambda number: "uninformative" if number == 3 else None)
    act = world.act

    def failing(number: int, attempt: int) -> Awaitable[RolloutGroup]:
        if number == 4:
            raise ValueError("no actor is left")
        return act(number, attempt)

    world.act = failing  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match="no actor is left"):
        run(world, groups_per_step=1, steps=9)


@pytest.mark.parametrize("part", ["learn", "publish"])
def test_a_learner_that_raises_ends_the_loop_with_its_error(part: str) -> None:
    world = World(turns=uneven(0, 9))

    async def failing(*_: object) -> None:
        await asyncio.sleep(0)
        raise ValueError("no finite gradient")

    setattr(world, part, failing)
    with pytest.raises(ValueError, match="no finite gradient"):
        run(world, max_staleness=4)
    assert (world.ledger.step, world.ledger.trained) == ((0, 0) if part == "learn" else (1, 3))


def test_a_source_that_raises_ends_the_loop_with_its_error() -> None:
    def broken() -> Iterator[int]:
        yield from range(1, 5)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(World(), groups_per_step=1, numbers=broken())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_source_that_runs_out_is_an_error_that_says_when(count: int) -> None:
    world = World()
    with pytest.raises(TrainingStalledError, match=f"ran out after {count}"):
        run(world, max_staleness=1, numbers=iter(range(1, count + 1)))
    assert len(world.trained) == count // 3


def test_a_source_with_just_enough_problems_is_no_error() -> None:
    assert run(World(), steps=3, numbers=iter(range(1, 10))).step == 3


def test_a_loop_whose_steps_are_done_starts_nothing() -> None:
    world = World(version=3)
    world.ledger.step = 3
    ledger = run(world, steps=3)
    assert (ledger.step, ledger.issued, world.attempts) == (3, 0, {})


def test_a_stop_during_a_step_ends_the_loop_after_it() -> None:
    world = World(learn_turns=20)

    async def beside(stop: asyncio.Event, _: "asyncio.Task[None]") -> None:
        while len(world.trained) < 2:
            await asyncio.sleep(0)
        stop.set()

    ledger = run(world, max_staleness=1, steps=100, beside=beside)
    assert ledger.step == world.version == len(world.trained) == 2
    assert ledger.trained == 6


def test_a_stop_while_a_batch_is_collected_ends_the_loop_and_leaves_its_problems_for_the_next_attempt() -> None:
    # Problem 6 never ends, so the second batch has 4 and 7 and waits; they were not learned from. 5 is settled.
    world = World(turns=lambda number: 10**9 if number == 6 else 0, drop=lambda number: "dull" if number == 5 else None)

    async def beside(stop: asyncio.Event, _: "asyncio.Task[None]") -> None:
        while 6 not in world.attempts:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        stop.set()

    ledger = run(world, steps=100, beside=beside)
    assert (ledger.step, world.trained) == (1, [[1, 2, 3]])
    assert (ledger.unsettled, ledger.dropped) == ([4, 6, 7], Counter(dull=1))


def test_a_stop_before_the_first_step_trains_nothing() -> None:
    world = World()

    async def beside(stop: asyncio.Event, _: "asyncio.Task[None]") -> None:
        stop.set()

    assert run(world, beside=beside).step == 0
    assert world.trained == []


@pytest.mark.parametrize("waiting_for", ["groups", "later groups"])
def test_a_loop_that_is_cancelled_takes_everything_with_it(waiting_for: str) -> None:
    world = World(turns=lambda number: 0 if waiting_for == "later groups" and number <= 3 else 10**9)

    async def beside(_: asyncio.Event, task: "asyncio.Task[None]") -> None:
        for _ in range(30):
            await asyncio.sleep(0)
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        run(world, beside=beside)
    assert len(world.trained) == (waiting_for == "later groups")
