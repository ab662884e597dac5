"""Plug-ins that the tests hand to the system by reference, as a user's own module would."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from rlsys.learners.fsdp import FsdpLearner
from rlsys.types import Problem
from rlsys.weights import checksum


def share_of_digits(_problem: Problem, response: str) -> float:
    """How much of the response are digits: dense, so that a random policy can climb it in a few steps."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def words_problems(*, size: int) -> list[Problem]:
    """Problems without an answer."""
    return [Problem(id=f"p{i}", prompt=({"role": "user", "content": f"Say {i}"},)) for i in range(size)]


class CorruptingLearner(FsdpLearner):
    """A learner on a bad wire: armed, one number of one tensor changes after its checksum was taken."""

    victim = "model.norm.weight"
    _bad_updates = 0

    def arm(self, updates: int) -> None:
        """Corrupt so many updates."""
        self._bad_updates = updates

    def send_weights(self) -> dict[str, int]:
        """As the parent does, on that wire."""
        if self._sender is None or not self._bad_updates:
            return super().send_weights()
        self._bad_updates -= 1
        true_sums = {}

        def damaged() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._full_weights():
                if name == self.victim:
                    true_sums[name] = checksum(tensor)
                    tensor = tensor.clone()
                    tensor[0] += 1e-3
                yield name, tensor

        return self._sender.send(damaged()) | true_sums
