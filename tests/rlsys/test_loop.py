"""The training loop: how stale a group may be, in which order groups are trained, and how it ends."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlsys.errors import TrainingStalledError
from rlsys.loop import Loop, LoopState
from rlsys.types import Problem, RolloutGroup

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

MESSAGE = {"role": "user", "content": "?"}


def endless_problems() -> Iterator[Problem]:
    return (Problem(id=str(number), prompt=(MESSAGE,)) for number in itertools.count())


@dataclass
class World:
    """A fake actor and a fake learner that write down what happens; time is counted in turns of the event loop."""

    turns: Callable[[int], int] = lambda _: 0
    """How long it takes to act on the problem with this number."""
    learn_turns: int = 0
    drop: Callable[[int], str | None] = lambda _: None
    finished_learns: int = 0
    version_at_start: dict[int, int] = field(default_factory=dict)
    trained: list[list[int]] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    drops: list[dict[str, int]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    acting_while_learning: bool = False
    cancelled: int = 0

    async def act(self, problem: Problem) -> RolloutGroup:
        number = int(problem.id)
        self.version_at_start[number] = self.finished_learns
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
        return RolloutGroup(problem=problem, rollouts=())

    async def learn(self, step: int, groups: list[RolloutGroup], dropped: Mapping[str, int]) -> None:
        assert step == self.finished_learns + 1
        numbers = [int(group.problem.id) for group in groups]
        self.trained.append(numbers)
        self.staleness += [self.finished_learns - self.version_at_start[number] for number in numbers]
        self.drops.append(dict(dropped))
        for _ in range(self.learn_turns):
            self.acting_while_learning |= self.in_flight > 0
            await asyncio.sleep(0)
        self.finished_learns += 1

    def reason(self, group: RolloutGroup) -> str | None:
        return self.drop(int(group.problem.id))

    def loop(self, *, groups_per_step: int = 3, max_staleness: int = 0, max_skipped_groups: int = 50) -> Loop:
        return Loop(
            act=self.act,
            learn=self.learn,
            drop_reason=self.reason,
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            max_skipped_groups=max_skipped_groups,
        )


def run(
    loop: Loop,
    *,
    steps: int = 5,
    problems: Iterator[Problem] | None = None,
    state: LoopState | None = None,
    beside: Callable[[asyncio.Event, "asyncio.Task[LoopState]"], Awaitable[None]] | None = None,
) -> LoopState:
    """Run the loop with a deadline and see that it leaves no task behind, however it ends."""

    async def main() -> LoopState:
        stop = asyncio.Event()
        before = asyncio.all_tasks()
        stream = endless_problems() if problems is None else problems
        task = asyncio.create_task(loop.run(stream, steps=steps, state=state or LoopState(), stop=stop))
        try:
            async with asyncio.timeout(60):
                if beside is not None:
                    await beside(stop, task)
                return await task
        finally:
            left = asyncio.all_tasks() - before - {task}
            assert not left, f"left behind: {left}"

    return asyncio.run(main())


def uneven(seed: int, longest: int) -> Callable[[int], int]:
    return lambda number: random.Random(seed * 1_000_003 + number).randrange(longest + 1)


# --- staleness -------------------------------------------------------------------------------------------------------


@PATIENT
@given(
    max_staleness=st.sampled_from([0, 1, 4]),
    groups_per_step=st.integers(1, 5),
    longest=st.sampled_from([0, 1, 7, 40]),
    learn_turns=st.sampled_from([0, 1, 20]),
    dropped=st.sampled_from([0.0, 0.3, 0.8]),
    seed=st.integers(0, 1000),
)
def test_no_group_is_trained_by_a_policy_more_versions_newer_than_the_bound(
    max_staleness: int, groups_per_step: int, longest: int, learn_turns: int, dropped: float, seed: int
) -> None:
    def drop(number: int) -> str | None:
        return "uninformative" if random.Random(seed + number * 7919).random() < dropped else None

    world = World(turns=uneven(seed, longest), learn_turns=learn_turns, drop=drop)
    run(world.loop(groups_per_step=groups_per_step, max_staleness=max_staleness, max_skipped_groups=1000), steps=8)
    assert max(world.staleness) <= max_staleness
    assert min(world.staleness) >= 0
    assert world.most_in_flight <= (max_staleness + 1) * groups_per_step
    order = [number for numbers in world.trained for number in numbers]
    assert order == [number for number in range(order[-1] + 1) if drop(number) is None], "in start order, none left out"
    assert all(len(numbers) == groups_per_step for numbers in world.trained)


@pytest.mark.parametrize("longest", [0, 5, 30])
def test_with_a_bound_of_zero_nothing_acts_while_the_learner_learns(longest: int) -> None:
    world = World(turns=uneven(1, longest), learn_turns=10)
    run(world.loop(max_staleness=0), steps=6)
    assert set(world.staleness) == {0}
    assert not world.acting_while_learning
    assert world.trained == [[3 * step, 3 * step + 1, 3 * step + 2] for step in range(6)]


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_with_a_bound_above_zero_actors_go_on_while_the_learner_learns(max_staleness: int) -> None:
    world = World(turns=lambda _: 15, learn_turns=10)
    run(world.loop(max_staleness=max_staleness), steps=12)
    assert world.acting_while_learning
    assert max(world.staleness) == max_staleness, "the room that the bound gives is used"


def test_groups_are_trained_in_the_order_in_which_they_started_not_in_which_they_ended() -> None:
    world = World(turns=lambda number: 30 if number % 3 == 0 else 0)
    run(world.loop(max_staleness=1), steps=4)
    assert world.trained == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


# --- drops -----------------------------------------------------------------------------------------------------------


def test_a_dropped_group_gives_its_slot_to_another() -> None:
    world = World(drop=lambda number: "uninformative" if number % 2 == 0 else None)
    state = run(world.loop(), steps=2)
    assert world.trained == [[1, 3, 5], [7, 9, 11]]
    assert world.drops == [{"uninformative": 3}, {"uninformative": 3}]
    assert state.dropped == Counter(uninformative=6)
    assert (state.step, state.cursor) == (2, 12)


def test_drops_are_counted_by_reason_for_each_step() -> None:
    world = World(drop=lambda number: {0: "too_long", 1: "reward_error", 5: "too_long"}.get(number))
    run(world.loop(groups_per_step=2), steps=3)
    assert world.drops == [{"too_long": 1, "reward_error": 1}, {"too_long": 1}, {}]


def test_an_endless_stream_of_groups_without_information_ends_with_an_error_that_says_so() -> None:
    world = World(drop=lambda _: "uninformative")
    with pytest.raises(TrainingStalledError, match=r"20 groups in a row .*uninformative.*rl\.group_size"):
        run(world.loop(max_skipped_groups=20))
    assert len(world.version_at_start) < 20 + 10
    assert not world.trained


def test_groups_that_teach_something_in_between_start_the_count_anew() -> None:
    world = World(drop=lambda number: None if number % 10 == 0 else "uninformative")
    state = run(world.loop(max_skipped_groups=10), steps=4)
    assert state.step == 4
    with pytest.raises(TrainingStalledError):
        run(world.loop(max_skipped_groups=9), steps=4)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_what_is_still_in_flight_at_the_end_is_cancelled() -> None:
    world = World(turns=lambda number: 10**9 if number >= 6 else 0)
    state = run(world.loop(max_staleness=1), steps=2)
    assert (state.step, state.cursor, world.in_flight) == (2, 6, 0)


def test_an_actor_that_raises_ends_the_loop_with_its_error_and_cancels_the_others() -> None:
    world = World(turns=lambda number: 10**9 if number > 4 else 1)
    act = world.act

    async def failing(problem: Problem) -> RolloutGroup:
        if problem.id == "4":
            raise ValueError("the actor died")
        return await act(problem)

    world.act = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the actor died"):
        run(world.loop(max_staleness=2), steps=9)
    assert world.trained == [[0, 1, 2]]
    assert world.in_flight == 0
    assert world.cancelled > 0


def test_an_actor_that_raises_before_it_waits_ends_the_loop_as_well() -> None:
    world = World(drop=lambda number: "uninformative" if number == 3 else None)
    act = world.act

    def failing(problem: Problem) -> Awaitable[RolloutGroup]:
        if problem.id == "4":
            raise ValueError("no actor is left")
        return act(problem)

    world.act = failing  # type: ignore[assignment,method-assign]
    with pytest.raises(ValueError, match="no actor is left"):
        run(world.loop(groups_per_step=1), steps=9)


def test_a_learner_that_raises_ends_the_loop_with_its_error() -> None:
    world = World(turns=uneven(0, 9))

    async def failing(step: int, groups: list[RolloutGroup], dropped: Mapping[str, int]) -> None:  # noqa: ARG001
        await asyncio.sleep(0)
        raise ValueError("no finite gradient")

    world.learn = failing  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no finite gradient"):
        run(world.loop(max_staleness=4))
    assert world.in_flight == 0


def test_a_source_that_raises_ends_the_loop_with_its_error() -> None:
    def broken() -> Iterator[Problem]:
        yield from itertools.islice(endless_problems(), 4)
        raise OSError("the disk is gone")

    world = World()
    with pytest.raises(OSError, match="the disk is gone"):
        run(world.loop(groups_per_step=1), problems=broken())


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_source_that_runs_out_is_an_error_that_says_when(count: int) -> None:
    world = World()
    with pytest.raises(TrainingStalledError, match=f"ran out after {count}"):
        run(world.loop(max_staleness=1), problems=itertools.islice(endless_problems(), count))
    assert len(world.trained) == count // 3


def test_a_source_with_just_enough_problems_is_no_error() -> None:
    assert run(World().loop(), steps=3, problems=itertools.islice(endless_problems(), 9)).step == 3


def test_a_loop_whose_steps_are_done_starts_nothing() -> None:
    world = World()
    state = run(world.loop(), steps=3, state=LoopState(step=3, cursor=9))
    assert (state.step, state.cursor, world.version_at_start) == (3, 9, {})


def test_a_loop_goes_on_from_the_state_it_is_given() -> None:
    world = World(finished_learns=2)
    state = run(world.loop(), steps=4, state=LoopState(step=2, cursor=40, dropped=Counter(old=1)))
    assert (state.step, state.cursor, state.dropped, len(world.trained)) == (4, 46, Counter(old=1), 2)


def test_a_stop_during_a_step_ends_the_loop_after_it() -> None:
    world = World(learn_turns=20)

    async def beside(stop: asyncio.Event, _: "asyncio.Task[LoopState]") -> None:
        while len(world.trained) < 2:
            await asyncio.sleep(0)
        stop.set()

    state = run(world.loop(max_staleness=1), steps=100, beside=beside)
    assert state.step == world.finished_learns == len(world.trained) == 2
    assert state.cursor == 6


def test_a_stop_while_a_batch_is_collected_ends_the_loop_and_leaves_its_problems_for_the_next_attempt() -> None:
    # Problem 5 never ends, so the second batch has 3 and 4 and waits; they were not learned from.
    world = World(turns=lambda number: 10**9 if number == 5 else 0, drop=lambda number: "dull" if number == 4 else None)

    async def beside(stop: asyncio.Event, _: "asyncio.Task[LoopState]") -> None:
        while 5 not in world.version_at_start:
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        stop.set()

    state = run(world.loop(), steps=100, beside=beside)
    assert (state.step, world.trained) == (1, [[0, 1, 2]])
    assert (state.cursor, state.dropped) == (3, Counter())
    assert world.in_flight == 0


def test_a_stop_before_the_first_step_trains_nothing() -> None:
    world = World()

    async def beside(stop: asyncio.Event, _: "asyncio.Task[LoopState]") -> None:
        stop.set()

    assert run(world.loop(), beside=beside).step == 0
    assert world.trained == []


@pytest.mark.parametrize("waiting_for", ["groups", "problems"])
def test_a_loop_that_is_cancelled_takes_everything_with_it(waiting_for: str) -> None:
    world = World(turns=lambda _: 10**9)
    if waiting_for == "problems":
        world.turns = lambda number: 0 if number < 3 else 10**9

    async def beside(_: asyncio.Event, task: "asyncio.Task[LoopState]") -> None:
        for _ in range(30):
            await asyncio.sleep(0)
        task.cancel()

    with pytest.raises(asyncio.CancelledError):
        run(world.loop(), beside=beside)
    assert world.in_flight == 0
