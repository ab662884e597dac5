"""The ledger of a stage: what became of every problem that was issued, so that none is lost and none trained twice.

A problem is known by its number in the stream. It is *in flight* from being issued until a group of rollouts of it is
delivered, then *done*, and settled once it was *trained* or *dropped*: settled ones are kept as counts alone, so a
ledger is as small as the number of groups that are under way. Nothing here waits or knows what a problem is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rlsys.errors import CheckpointError


class Ledger:
    """Every problem that was issued, and the policy steps that were trained.

    Always: issued = in flight + done + trained + dropped.

    Each time a problem is issued it has another attempt number, from 1. (number, attempt) is the key of a group: it is
    delivered once, and one of an earlier attempt, of a settled problem or of one that was never issued is refused.
    Misuse, such as to settle a problem that is not done, raises ValueError.
    """

    def __init__(self) -> None:
        self.step = 0
        """Policy steps that were trained."""
        self.last = 0
        """The highest number that was issued; numbers begin with 1 and may have gaps."""
        self.issued = 0
        """Problems, however often each of them was issued."""
        self.trained = 0
        """Problems that were trained."""
        self.dropped: Counter[str] = Counter()
        """Problems that are not trained, by the kind of reason: the word before a colon."""
        self.discarded: Counter[str] = Counter()
        """Groups that were thrown away for a fault, their problems to be issued again, by reason."""
        self.refused = 0
        """Groups that were delivered a second time, or too late."""
        self._attempts: dict[int, int] = {}  # of each problem that is not settled, in the order of numbers
        self._done: set[int] = set()

    @property
    def unsettled(self) -> list[int]:
        """The numbers of the problems that are in flight or done, in order."""
        return list(self._attempts)

    @property
    def in_flight(self) -> int:
        """Problems without a group."""
        return len(self._attempts) - len(self._done)

    @property
    def done(self) -> int:
        """Problems with a group that has not been trained or dropped yet."""
        return len(self._done)

    def issue(self, number: int) -> int:
        """Issue a problem, for the first time or, where it is in flight, once more; returns the attempt's number."""
        if number in self._attempts:
            if number in self._done:
                raise ValueError(f"problem {number} has a group already; discard that one first")
        elif number <= self.last:
            raise ValueError(f"problem {number} was settled or passed over: the last one issued was {self.last}")
        else:
            self.issued += 1
            self.last = number
            self._attempts[number] = 0
        self._attempts[number] += 1
        return self._attempts[number]

    def deliver(self, number: int, attempt: int) -> bool:
        """Take a group in; False, counted as refused, where it is not the one that is waited for."""
        if self._attempts.get(number) != attempt or number in self._done:
            self.refused += 1
            return False
        self._done.add(number)
        return True

    def discard(self, number: int, reason: str) -> None:
        """Throw the group of a problem away; the problem is in flight again and may be issued once more."""
        self._require_done(number)
        self._done.remove(number)
        self.discarded[_kind(reason)] += 1

    def drop(self, number: int, reason: str) -> None:
        """Settle a problem that is not to be trained."""
        self._settle(number)
        self.dropped[_kind(reason)] += 1

    def train(self, numbers: Iterable[int], step: int) -> None:
        """Settle the problems that policy step `step` (from 1) was trained with."""
        if step != self.step + 1:
            raise ValueError(f"step {step} cannot follow step {self.step}")
        for number in numbers:
            self._settle(number)
            self.trained += 1
        self.step = step

    def _settle(self, number: int) -> None:
        self._require_done(number)
        self._done.remove(number)
        del self._attempts[number]

    def _require_done(self, number: int) -> None:
        if number not in self._done:
            state = "in flight" if number in self._attempts else "settled or was never issued"
            raise ValueError(f"problem {number} has no group that could be settled: it is {state}")

    # --- what a person and a checkpoint see --------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """How many problems were issued and what became of them, and the groups that were discarded and refused."""
        return {
            "issued": self.issued,
            "in_flight": self.in_flight,
            "done": self.done,
            "trained": self.trained,
            "dropped": self.dropped.total(),
            "discarded": self.discarded.total(),
            "refused": self.refused,
        }

    @property
    def conserved(self) -> bool:
        """Whether every problem that was issued is in one place, and one only."""
        return (
            self.issued == self.in_flight + self.done + self.trained + self.dropped.total()
            and self._done <= self._attempts.keys()
            and all(0 < number <= self.last for number in self._attempts)
        )

    def state(self) -> dict[str, Any]:
        """All of it as JSON, but for the groups of problems that are done: these will be in flight."""
        return {
            "step": self.step,
            "last": self.last,
            "issued": self.issued,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "discarded": dict(self.discarded),
            "refused": self.refused,
            "unsettled": [list(pair) for pair in self._attempts.items()],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Ledger:
        """The ledger that gave this state; what was not settled is in flight, to be issued again.

        Raises:
            CheckpointError: it does not add up.
        """
        ledger = cls()
        try:
            ledger.step, ledger.last = int(state["step"]), int(state["last"])
            ledger.issued, ledger.trained, ledger.refused = (
                int(state[name]) for name in ("issued", "trained", "refused")
            )
            ledger.dropped, ledger.discarded = Counter(state["dropped"]), Counter(state["discarded"])
            ledger._attempts = {int(number): int(attempt) for number, attempt in sorted(state["unsettled"])}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the ledger of a checkpoint cannot be read ({type(error).__name__}: {error})"
            ) from error
        if not ledger.conserved:
            raise CheckpointError(f"the ledger of a checkpoint does not add up: {ledger.counts()}")
        return ledger


def _kind(reason: str) -> str:
    return reason.partition(":")[0]
