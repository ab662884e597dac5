"""A deterministic stand-in for the vLLM engine: the same calls and real weight transfers, but no model.

With it the whole system runs on real processes in seconds, which is what tests of the fleet and of its recovery need.
What it writes is no model's text, so a learner beside it disagrees about every log-prob: raise `rl.max_logprob_gap`.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlsys.actors.receivers import WeightReceiver, open_receiver
from rlsys.config import ActorsConfig
from rlsys.errors import ActorError, EngineDiedError
from rlsys.plugins import check_options
from rlsys.types import Completion
from rlsys.weights import GLOO_BACKEND, WeightGroup, WeightPlan, checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEngineOptions:
    """`actors.engine_options` of a `FakeEngine`."""

    median_tokens: float = 24.0
    """Median length of a completion; lengths are lognormal."""
    spread: float = 0.6
    """Standard deviation of the logarithm of the length; 0 makes all completions equally long."""
    tokens_per_second: float = 0.0
    """Of each completion, however many are written at once; 0 is as fast as it can."""
    chunk_tokens: int = 8
    """So many tokens are written at once, between two pauses."""
    seed: int | None = None
    """In place of the worker's own seed: then it does not matter which worker writes."""


class FakeEngine:
    """Writes tokens that depend on nothing but the seed, the prompt and the weights that it holds.

    Requests with the same prompt, as siblings make them, are numbered from 0 on under each set of weights, and the
    number counts as a seed of the request's own; one that has `sampling["seed"]` depends on that instead. Each token is
    drawn from Zipf's law over a permutation of the vocabulary that the weights determine; its log-prob is that of this
    distribution, whatever the temperature. Lengths are drawn apart, and stop strings are not looked for.
    """

    backend = GLOO_BACKEND

    def __init__(self, *, model_path: str, config: ActorsConfig, seed: int) -> None:
        check_options(FakeEngineOptions, config.engine_options, place="actors.engine_options of FakeEngine")
        self._options = FakeEngineOptions(**config.engine_options)
        self._seed = seed if self._options.seed is None else self._options.seed
        self._sync_seconds = config.sync_seconds
        model = json.loads((Path(model_path) / "config.json").read_text())
        self._vocabulary_size, self._end = int(model["vocab_size"]), int(model["eos_token_id"])
        self._places = asyncio.Semaphore(config.max_rollouts)
        self._going = asyncio.Event()
        self._going.set()
        self._asked: Counter[int] = Counter()
        self._num_running = self._num_tokens = 0
        self._version = 0
        self._weights = 0  # checksum of all that it holds; 0 for those that it was made with
        self._receiver: WeightReceiver | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Mark the weights that the engine was made with as version 0."""
        await self.resume(0)

    async def generate(self, prompt: Sequence[int], *, sampling: Mapping[str, Any]) -> Completion:
        """Continue `prompt`; every token comes with its log-prob and the version of the weights that wrote it.

        Raises:
            EngineDiedError: the engine was closed.
        """
        request = self._request(prompt, sampling)
        length, finish = self._length(request, sampling)
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        self._num_running += 1
        try:
            async with self._places:
                while len(tokens) < length:
                    count = min(self._options.chunk_tokens, length - len(tokens))
                    await self._take_time(count)
                    while not self._going.is_set():  # a pause may follow a pause before this runs
                        await self._going.wait()
                    self._require_life()
                    ids, own = self._draw((*request, len(tokens)), count)
                    tokens += ids.tolist()
                    logprobs += own.tolist()
                    versions += [self._version] * count
                    self._num_tokens += count
        finally:
            self._num_running -= 1
        if finish == "stop":
            tokens[-1] = self._end
        return Completion(
            tokens=np.array(tokens, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            versions=np.array(versions, dtype=np.int32),
            text="",
            finish_reason=finish,
        )

    def _request(self, prompt: Sequence[int], sampling: Mapping[str, Any]) -> tuple[int, int, int]:
        """What a completion depends on besides the weights."""
        digest = zlib.crc32(np.asarray(prompt, dtype=np.int32).tobytes())
        if (own_seed := sampling.get("seed")) is not None:
            return 0, digest, int(own_seed)
        number = self._asked[digest]
        self._asked[digest] += 1
        return 1 + self._seed, digest, number

    def _length(
        self, request: tuple[int, int, int], sampling: Mapping[str, Any]
    ) -> tuple[int, Literal["stop", "length"]]:
        limit = int(sampling["max_tokens"])
        drawn = np.random.default_rng([*request, self._weights]).lognormal(sigma=self._options.spread)
        length = max(1, round(self._options.median_tokens * float(drawn)))
        return (limit, "length") if length > limit or sampling.get("ignore_eos") else (length, "stop")

    async def _take_time(self, num_tokens: int) -> None:
        rate = self._options.tokens_per_second
        await asyncio.sleep(num_tokens / rate if rate else 0)

    def _draw(self, seeds: Sequence[int], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """`count` tokens by the weights of now, and their log-probs."""
        words, probabilities = _zipf(self._vocabulary_size, self._end, self._weights)
        ranks = np.random.default_rng([*seeds, self._weights]).choice(len(words), size=count, p=probabilities)
        return words[ranks], np.log(probabilities[ranks])

    async def pause(self) -> None:
        """Freeze what is being generated."""
        self._require_life()
        self._going.clear()

    async def resume(self, version: int) -> None:
        """Go on; from here every token is marked with `version`."""
        self._require_life()
        self._version = version
        self._asked.clear()
        self._going.set()

    async def pulse(self) -> dict[str, int]:
        """Tokens written so far, and generations in the engine.

        Raises:
            EngineDiedError: the engine was closed.
        """
        self._require_life()
        return {"tokens": self._num_tokens, "running": self._num_running}

    async def open_weights(self, group: WeightGroup, *, rank: int) -> None:
        """Meet the learner at `group` as `rank`."""
        self._leave()
        self._receiver = await asyncio.to_thread(open_receiver, group, rank=rank, seconds=self._sync_seconds)

    async def receive_weights(self, plan: WeightPlan) -> dict[str, int]:
        """Receive one full set of weights (the engine must be paused); returns checksums of what arrived."""
        if self._num_running and self._going.is_set():
            raise ActorError("weights arrive while the engine generates with the old ones; pause it first")
        assert self._receiver is not None, "open_weights comes first"
        return await asyncio.to_thread(self._receive, plan, self._receiver)

    def _receive(self, plan: WeightPlan, receiver: WeightReceiver) -> dict[str, int]:
        checksums = {name: checksum(tensor) for name, tensor in receiver.receive(plan)}
        self._weights = sum(checksums.values()) % 2**64
        return checksums

    def _leave(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    def _require_life(self) -> None:
        if self._is_closed:
            raise EngineDiedError("the engine has ended; nothing can be asked of it any more")

    def close(self) -> None:
        """Leave the group and end every generation with an error."""
        self._is_closed = True
        self._going.set()
        self._leave()


@lru_cache(maxsize=4)
def _zipf(vocabulary_size: int, end: int, weights: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All tokens but the one that ends a turn, the likeliest first, and their probabilities."""
    order = np.random.default_rng(weights).permutation(vocabulary_size)
    words = order[order != end]
    shares = 1.0 / np.arange(1, len(words) + 1)
    return words, shares / shares.sum()
