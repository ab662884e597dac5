"""Plug-ins that the tests hand to the system by reference, as a user's own module would."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlsys.learners.fsdp import FsdpLearner
from rlsys.types import Problem
from rlsys.weights import broadcast, checksum


def share_of_digits(_problem: Problem, response: str) -> float:
    """How much of the response are digits: dense, so that a random policy can climb it in a few steps."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def words_problems(*, size: int) -> list[Problem]:
    """Problems without an answer."""
    return [Problem(id=f"p{i}", prompt=({"role": "user", "content": f"Say {i}"},)) for i in range(size)]


class CorruptingLearner(FsdpLearner):
    """A learner on a bad wire: once armed, one number of one tensor changes after its checksum was taken."""

    victim = "model.norm.weight"

    def arm(self) -> None:
        """From now on, corrupt."""
        if self._sender is not None:
            self._sender.send = self._send_damaged  # type: ignore[method-assign]

    def _send_damaged(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
        sums = {}
        for name, tensor in tensors:
            sums[name] = checksum(tensor)
            if name == self.victim:
                tensor = tensor.clone()
                tensor[0] += 1e-3
            broadcast(tensor, self._sender._group)  # type: ignore[union-attr,attr-defined]
        return sums
