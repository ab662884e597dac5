"""The pure state machine of the rollout workers, and how many the work at hand needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from rlsys.errors import ConfigError
from rlsys.workers import QueueFollower, Roster, WorkerState


def roster_of(count: int, *, capacity: int = 8, **limits: int) -> Roster:
    roster = Roster(target=count, capacity=capacity, **limits)
    for number in range(count):
        roster.joined(f"w{number}")
        roster.started(f"w{number}")
    roster.synced([f"w{number}" for number in range(count)], 0)
    return roster


def test_a_worker_gets_no_work_before_it_holds_the_published_weights() -> None:
    roster = Roster(target=1, capacity=8)
    roster.joined("w0")
    assert roster.take(1) is None
    roster.started("w0")
    assert roster.take(1) is None
    roster.synced(["w0"], 3)
    worker = roster.take(1)
    assert worker is not None
    assert worker.version == 3


def test_work_goes_to_the_worker_with_the_fewest_rollouts_and_never_beyond_the_capacity() -> None:
    roster = roster_of(2)
    taken = [roster.take(4) for _ in range(5)]
    assert [worker.name if worker else None for worker in taken] == ["w0", "w1", "w0", "w1", None]
    roster.give_back(roster.workers["w1"], 4)
    assert roster.take(5) is None
    worker = roster.take(4)
    assert worker is not None
    assert worker.name == "w1"


def test_a_group_larger_than_the_capacity_goes_to_an_idle_worker_alone() -> None:
    roster = roster_of(1, capacity=4)
    worker = roster.take(16)
    assert worker is not None
    assert roster.take(1) is None
    roster.give_back(worker, 16)
    assert roster.take(1) is worker


def test_who_was_not_given_the_new_version_is_stale() -> None:
    roster = roster_of(3)
    roster.synced(["w0", "w2"], 1)
    assert [worker.name for worker in roster.serving] == ["w0", "w2"]
    assert roster.workers["w1"].state is WorkerState.STALE
    with pytest.raises(ValueError, match="older than those that were published"):
        roster.synced(["w1"], 0)


def test_after_the_learner_went_back_nobody_serves_until_synced_again() -> None:
    roster = roster_of(2)
    roster.synced(["w0", "w1"], 5)
    roster.restored(3)
    assert roster.take(1) is None
    roster.synced(["w0", "w1"], 3)
    assert roster.take(1) is not None


def test_the_surplus_is_whoever_is_of_least_use() -> None:
    roster = roster_of(3)
    busy = roster.take(2)
    assert busy is not None
    assert busy.name == "w0"
    roster.joined("w3")
    roster.resize(2)
    assert [worker.name for worker in roster.surplus] == ["w3", "w2"]
    roster.draining("w3")
    roster.draining("w2")
    assert roster.surplus == []
    assert roster.missing == 0


@pytest.mark.parametrize("count", [0, -1, 1, 9])
def test_a_size_outside_of_the_limits_is_refused_by_their_names(count: int) -> None:
    roster = roster_of(2, minimum=2, maximum=8)
    with pytest.raises(ConfigError, match=rf"{count} rollout workers are (fewer than actors.min|more than actors.max)"):
        roster.resize(count)
    assert roster.target == 2


def test_what_cannot_happen_in_a_state_raises() -> None:
    roster = roster_of(1)
    with pytest.raises(ValueError, match="here already"):
        roster.joined("w0")
    roster.draining("w0")
    with pytest.raises(ValueError, match="w0 is draining and cannot become healthy"):
        roster.synced(["w0"], 1)


class AnyOrder(RuleBasedStateMachine):
    """Events in any order that can happen: capacity, versions and counts hold throughout."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.roster = Roster(target=2, capacity=6)
        self.taken: list[tuple[object, int]] = []
        self.number = 0

    @rule(target=names)
    def join(self) -> str:
        self.number += 1
        self.roster.joined(f"w{self.number}")
        return f"w{self.number}"

    @rule(name=names)
    def start(self, name: str) -> None:
        worker = self.roster.workers.get(name)
        if worker is not None and worker.state is WorkerState.STARTING:
            self.roster.started(name)

    @rule(step=st.integers(0, 1), some=st.integers(1, 3))
    def sync(self, step: int, some: int) -> None:
        ready = self.roster.in_state(WorkerState.STALE, WorkerState.HEALTHY)
        self.roster.synced([worker.name for worker in ready[::some]], self.roster.version + step)

    @rule(size=st.integers(1, 8))
    def take(self, size: int) -> None:
        fewest = min((worker.in_flight for worker in self.roster.serving), default=None)
        worker = self.roster.take(size)
        if worker is None:
            assert fewest is None or (fewest > 0 and fewest + size > 6)
        else:
            assert worker.in_flight == (fewest or 0) + size
            self.taken.append((worker, size))

    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        if self.taken:
            worker, size = self.taken.pop(which % len(self.taken))
            self.roster.give_back(worker, size)  # type: ignore[arg-type]

    @rule(name=names)
    def lose(self, name: str) -> None:
        if name in self.roster.workers:
            self.roster.gone(name)

    @rule(name=names)
    def drain(self, name: str) -> None:
        worker = self.roster.workers.get(name)
        if worker is not None and worker.state is not WorkerState.DRAINING:
            self.roster.draining(name)

    @rule(count=st.integers(1, 5))
    def resize(self, count: int) -> None:
        self.roster.resize(count)

    @invariant()
    def who_serves_holds_the_published_version(self) -> None:
        assert all(worker.version == self.roster.version for worker in self.roster.serving)

    @invariant()
    def nobody_is_missing_and_too_many_at_once(self) -> None:
        assert self.roster.missing == 0 or not self.roster.surplus
        assert len(self.roster.staying) + self.roster.missing - len(self.roster.surplus) == self.roster.target

    @invariant()
    def in_flight_is_what_was_taken(self) -> None:
        assert sum(size for worker, size in self.taken if worker in self.roster.workers.values()) == sum(
            worker.in_flight for worker in self.roster.workers.values()
        )


TestAnyOrder = AnyOrder.TestCase


def test_a_fleet_grows_at_once_with_the_queue_and_shrinks_only_after_a_while() -> None:
    roster = roster_of(2, minimum=1, maximum=5)
    follower = QueueFollower(rollouts_per_worker=10, patience=3)
    assert follower.look(roster, waiting=35) == 4
    roster.resize(4)
    assert follower.look(roster, waiting=0) == 4
    assert follower.look(roster, waiting=12) == 4
    assert follower.look(roster, waiting=0) == 2
    assert follower.look(roster, waiting=1000) == 5


@given(looks=st.lists(st.integers(0, 200), min_size=1, max_size=30))
def test_a_fleet_that_follows_the_queue_keeps_to_its_limits(looks: list[int]) -> None:
    roster = roster_of(2, minimum=2, maximum=7)
    follower = QueueFollower(rollouts_per_worker=8, patience=4)
    for waiting in looks:
        roster.resize(follower.look(roster, waiting=waiting))
