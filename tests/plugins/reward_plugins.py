"""Rewards for the tests: with every kind of trouble, which the response orders."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlsys.actors.reward import RewardActor
from rlsys.interfaces import RewardResult
from rlsys.types import Problem, Rollout, RolloutGroup

GIVEN_UP: list[str] = []
HOOKS: list[str] = []


def length(_problem: Problem, response: str) -> float:
    """How many characters the response has."""
    return float(len(response))


class Obedient:
    """Does what the response says: a number is its score; else a word."""

    async def start(self) -> None:
        HOOKS.append("start")

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> float | RewardResult:  # noqa: ARG002
        try:
            match response.split():
                case ["sleep", seconds]:
                    await asyncio.sleep(float(seconds))
                case ["raise", message]:
                    raise ValueError(message)
                case ["block", seconds]:  # as C code that never gives the event loop back
                    time.sleep(float(seconds))
                case ["die"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                case [number]:
                    return float(number)
        except asyncio.CancelledError:
            GIVEN_UP.append(response)
            raise
        return 1.0

    async def close(self) -> None:
        HOOKS.append("close")


class Synchronous(Obedient):
    """The same in a thread; `hang` is a call that nothing but the end of the process ends."""

    def score(self, problem: Problem, response: str, rollout: Rollout) -> float:  # type: ignore[override]  # noqa: ARG002
        match response.split():
            case ["hang", seconds]:
                time.sleep(float(seconds))
            case ["burn"]:
                re.match(r"(a+)+$", "a" * 64 + "b")  # keeps the interpreter's lock for ages
            case ["die"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["raise", message]:
                raise ValueError(message)
            case [number]:
                return float(number)
        return 1.0


class Ranks:
    """Each sibling's share of those that it is longer than; `fail` in a response fails."""

    def score_group(self, group: RolloutGroup) -> Sequence[float]:
        if any(rollout.response == "fail" for rollout in group.rollouts):
            raise ValueError("one of them is not to be compared")
        lengths = [len(rollout.response) for rollout in group.rollouts]
        return [sum(mine > other for other in lengths) / len(lengths) for mine in lengths]


class TellingRewardActor(RewardActor):
    """Says in which process it lives, so that a test can kill it."""

    async def pid(self) -> int:
        return os.getpid()


class Moody:
    """By the rollout's own tokens: kills its process (once for each rollout), hangs, burns, raises, or scores.

    What it is about to do is a file in `folder`, named after it and the rollout.
    """

    def __init__(self, *, folder: str) -> None:
        self.folder = Path(folder)

    @staticmethod
    def mood(tokens: NDArray[np.int32], logprobs: NDArray[np.float32]) -> tuple[str, int]:
        """What becomes of a rollout, and its score where it gets one: never 0."""
        key = zlib.crc32(tokens.tobytes() + logprobs.tobytes())
        kinds = {8: "die", 14: "hang", 17: "burn", 24: "raise", 100: "score"}
        return next(kind for limit, kind in kinds.items() if key % 100 < limit), key

    def score(self, problem: Problem, response: str, rollout: Rollout) -> float:  # noqa: ARG002
        kind, key = self.mood(rollout.tokens, rollout.logprobs)
        file = self.folder / f"{kind}-{key}"
        if kind == "die" and not file.exists():
            file.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        file.touch()
        match kind:
            case "hang":
                time.sleep(3600)
            case "burn":
                re.match(r"(a+)+$", "a" * 64 + "b")
            case "raise":
                raise ValueError("not in the mood")
        return 1.0 + key % 7
