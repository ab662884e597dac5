"""The ledger: where every problem is, what is delivered twice or too late, and what a checkpoint brings back."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rlsys.errors import CheckpointError
from rlsys.ledger import Ledger


def saved_and_restored(ledger: Ledger) -> Ledger:
    return Ledger.restored(json.loads(json.dumps(ledger.state())))


def test_a_problem_goes_from_issued_to_done_to_trained_or_dropped() -> None:
    ledger = Ledger()
    assert [ledger.issue(number) for number in (1, 2, 4)] == [1, 1, 1]
    assert (ledger.in_flight, ledger.done, ledger.unsettled) == (3, 0, [1, 2, 4])
    assert ledger.deliver(2, 1)
    assert ledger.deliver(1, 1)
    assert (ledger.in_flight, ledger.done) == (1, 2)
    ledger.drop(1, "reward_error: the judge was out")
    ledger.train([2], step=1)
    assert (ledger.step, ledger.trained, ledger.dropped) == (1, 1, Counter(reward_error=1))
    assert ledger.unsettled == [4]
    assert ledger.counts() == {
        "issued": 3,
        "in_flight": 1,
        "done": 0,
        "trained": 1,
        "dropped": 1,
        "discarded": 0,
        "refused": 0,
    }


def test_a_group_that_is_delivered_twice_or_too_late_is_refused_and_counted() -> None:
    ledger = Ledger()
    attempt = ledger.issue(1)
    assert ledger.deliver(1, attempt)
    assert not ledger.deliver(1, attempt), "twice"
    ledger.discard(1, "too_stale")
    second = ledger.issue(1)
    assert not ledger.deliver(1, attempt), "of an attempt that was given up"
    assert ledger.deliver(1, second)
    ledger.train([1], step=1)
    assert not ledger.deliver(1, second), "of a problem that is settled"
    assert not ledger.deliver(7, 1), "of a problem that this ledger never issued"
    assert (ledger.refused, ledger.trained, ledger.discarded) == (4, 1, Counter(too_stale=1))
    assert ledger.conserved


def test_what_was_not_settled_is_in_flight_again_after_a_resume_and_its_old_groups_are_refused() -> None:
    ledger = Ledger()
    for number in (1, 2, 3):
        ledger.issue(number)
    ledger.deliver(1, 1)
    ledger.train([1], step=1)
    ledger.deliver(3, 1)
    again = saved_and_restored(ledger)
    assert (again.step, again.unsettled, again.in_flight, again.done) == (1, [2, 3], 2, 0)
    assert (again.issue(2), again.issue(3)) == (2, 2)
    assert not again.deliver(3, 1)
    assert again.deliver(3, 2)
    assert again.issue(4) == 1
    assert again.issued == 4


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda ledger: ledger.issue(1), "problem 1 was settled or passed over: the last one issued was 3"),
        (lambda ledger: ledger.issue(2), "problem 2 has a group already"),
        (lambda ledger: ledger.drop(3, "late"), "problem 3 has no group that could be settled: it is in flight"),
        (lambda ledger: ledger.discard(9, "late"), "problem 9 has no group .* never issued"),
        (lambda ledger: ledger.train([1], 2), "problem 1 has no group .* it is settled"),
        (lambda ledger: ledger.train([2], 3), "step 3 cannot follow step 1"),
    ],
)
def test_misuse_is_an_error_that_names_the_problem(misuse: Any, message: str) -> None:
    ledger = Ledger()
    for number in (1, 2, 3):
        ledger.issue(number)
    for number in (1, 2):
        ledger.deliver(number, 1)
    ledger.train([1], step=1)
    with pytest.raises(ValueError, match=message):
        misuse(ledger)
    assert ledger.conserved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"issued": 5}, "does not add up: .*'issued': 5"),
        ({"unsettled": [[7, 1]]}, "does not add up"),
        ({"unsettled": [3]}, "cannot be read"),
        ({"trained": "many"}, "cannot be read"),
        ({"last": None}, "cannot be read"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_refused(change: dict[str, Any], message: str) -> None:
    ledger = Ledger()
    ledger.issue(1)
    state = {**ledger.state(), **change}
    with pytest.raises(CheckpointError, match=message):
        Ledger.restored(state)


def test_a_ledger_that_lacks_something_says_what() -> None:
    state = Ledger().state()
    del state["issued"]
    with pytest.raises(CheckpointError, match="KeyError: 'issued'"):
        Ledger.restored(state)


def test_a_ledger_is_as_small_as_what_is_under_way() -> None:
    ledger = Ledger()
    for step in range(1, 5001):
        for number in (2 * step - 1, 2 * step):
            assert ledger.deliver(number, ledger.issue(number))
        ledger.drop(2 * step, f"reward_error: a message of its own, {step}")
        ledger.train([2 * step - 1], step)
    assert (ledger.issued, ledger.trained, ledger.dropped) == (10000, 5000, Counter(reward_error=5000))
    assert len(json.dumps(ledger.state())) < 250


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order, and from whichever saved point it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.running: list[tuple[int, int]] = []
        """Groups that somebody may still deliver, those of ledgers that were lost among them."""
        self.fate: dict[int, str] = {}
        self.saved = (json.dumps(self.ledger.state()), dict(self.fate))

    @rule(gap=st.integers(1, 3))
    def issue_a_new_one(self, gap: int) -> None:
        number = self.ledger.last + gap
        self.running.append((number, self.ledger.issue(number)))

    @rule(choice=st.integers(0, 1000))
    def issue_one_again_whose_group_was_lost(self, choice: int) -> None:
        lost = [number for number in self.ledger.unsettled if number not in self.ledger._done]
        if lost:
            number = lost[choice % len(lost)]
            self.running.append((number, self.ledger.issue(number)))

    @rule(choice=st.integers(0, 1000), twice=st.booleans())
    def deliver(self, choice: int, twice: bool) -> None:
        if self.running:
            key = self.running[choice % len(self.running)]
            refused = self.ledger.refused
            taken = self.ledger.deliver(*key)
            assert self.ledger.refused == refused + (not taken)
            if twice:
                assert not self.ledger.deliver(*key)

    @rule(choice=st.integers(0, 1000), what=st.sampled_from(["train", "drop", "discard"]))
    def decide(self, choice: int, what: str) -> None:
        done = sorted(self.ledger._done)
        if not done:
            return
        number = done[choice % len(done)]
        if what == "discard":
            self.ledger.discard(number, "too_stale")
            return
        assert number not in self.fate, "settled twice"
        self.fate[number] = what
        if what == "drop":
            self.ledger.drop(number, "uninformative")
        else:
            self.ledger.train([number], self.ledger.step + 1)

    @rule()
    def save(self) -> None:
        self.saved = (json.dumps(self.ledger.state()), dict(self.fate))

    @rule()
    def lose_everything_since_the_save(self) -> None:
        state, self.fate = json.loads(self.saved[0]), dict(self.saved[1])
        self.ledger = Ledger.restored(state)

    @invariant()
    def nothing_is_lost_and_nothing_is_twice(self) -> None:
        assert self.ledger.conserved
        fates = Counter(self.fate.values())
        assert (self.ledger.trained, self.ledger.dropped.total()) == (fates["train"], fates["drop"])
        assert self.ledger.trained == self.ledger.step
        assert self.fate.keys().isdisjoint(self.ledger.unsettled)
        assert len(self.fate) + len(self.ledger.unsettled) == self.ledger.issued


TestAnyHistory = AnyHistory.TestCase


@given(st.lists(st.integers(1, 4), max_size=30))
def test_saving_and_restoring_changes_nothing_but_what_is_done(gaps: list[int]) -> None:
    ledger = Ledger()
    for position, gap in enumerate(gaps):
        number = ledger.last + gap
        attempt = ledger.issue(number)
        if position % 2:
            ledger.deliver(number, attempt)
        if position % 4 == 3:
            ledger.drop(number, "dull")
    again = saved_and_restored(ledger)
    assert again.state() == ledger.state()
    assert again.in_flight == ledger.in_flight + ledger.done
