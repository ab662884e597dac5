"""A learned reward: a sequence classifier with one label reads prompt and response and gives one number."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlsys.chat import load_tokenizer
from rlsys.errors import ConfigError
from rlsys.grader_text import GraderText
from rlsys.interfaces import RewardResult
from rlsys.rewards.untrusted import MAX_CHARACTERS_PER_TOKEN
from rlsys.types import Problem, Rollout


class RewardModel:
    """Scores prompt and response, in the chat template of the model, by its one logit (with `sigmoid`, in [0, 1]).

    `path` is a `save_pretrained` folder or hub name of a transformers `...ForSequenceClassification` with one label.
    Responses that arrive within `window_seconds` are scored together, those of like length in one forward pass of at
    most `max_batch_tokens` with padding, in a thread of its own. Who waits sets the deadline: a request that was
    cancelled is not computed.

    A text of more than `max_tokens` (by default as many as the model has positions) is never cut: its status is
    "too_long" and its score `too_long_score`. A raw logit has no lowest value, so choose one from the low end of the
    model's own scores where responses may be so long. What spells a control token in a response does not become one.
    """

    def __init__(
        self,
        *,
        path: str,
        sigmoid: bool = False,
        max_tokens: int | None = None,
        too_long_score: float = 0.0,
        max_batch_tokens: int = 16384,
        window_seconds: float = 0.005,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "auto",
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype of RewardModel is {dtype!r}; known: float32, bfloat16")
        if max_batch_tokens < 1 or (max_tokens is not None and max_tokens < 1) or not window_seconds >= 0:
            raise ConfigError(
                f"RewardModel: max_batch_tokens ({max_batch_tokens}) and max_tokens ({max_tokens}) must be at least 1, "
                f"window_seconds ({window_seconds}) at least 0"
            )
        if not math.isfinite(too_long_score):
            raise ConfigError(f"too_long_score of RewardModel is {too_long_score}; it must be finite")
        self._path = path
        self._sigmoid = sigmoid
        self._max_tokens = max_tokens
        self._too_long = RewardResult(score=too_long_score, status="too_long")
        self._max_batch_tokens = max_batch_tokens
        self._window_seconds = window_seconds
        self._dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: list[_Request] = []
        self._batcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model; ConfigError where there is none, or it is no reward model."""
        if self._thread is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="reward-model")
            try:
                await asyncio.get_running_loop().run_in_executor(thread, self._load)
            except BaseException:
                thread.shutdown(wait=False)
                raise
            self._thread = thread

    async def close(self) -> None:
        """Forget the model; requests that still wait are cancelled."""
        thread, self._thread = self._thread, None
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            batcher.cancel()
            await asyncio.gather(batcher, return_exceptions=True)
        for request in self._waiting:
            request.score.cancel()
        self._waiting.clear()
        if thread is not None:
            await asyncio.to_thread(thread.shutdown)  # a forward pass may be under way
            del self._model

    async def score(self, problem: Problem, response: str, rollout: Rollout) -> RewardResult:  # noqa: ARG002
        """Score one response; see the class."""
        if self._thread is None:
            raise RuntimeError(f"the reward model {self._path!r} is not running; await start() first")
        if len(response) > self._limit * MAX_CHARACTERS_PER_TOKEN:
            return self._too_long
        tokens = self.render(problem, response)
        if len(tokens) > self._limit:
            return self._too_long
        loop = asyncio.get_running_loop()
        request = _Request(tokens=tokens, score=loop.create_future())
        self._waiting.append(request)
        if self._batcher is None or self._batcher.done():
            self._batcher = loop.create_task(self._work())
        logit = await request.score
        return RewardResult(score=1 / (1 + math.exp(-max(logit, -700.0))) if self._sigmoid else logit)

    def render(self, problem: Problem, response: str) -> list[int]:
        """Token ids of the conversation that ends with the response."""
        before, rest = self._text.render(problem, response)
        return [*before, *rest]

    async def _work(self) -> None:
        """Score what waits until nothing does."""
        await asyncio.sleep(self._window_seconds)
        while self._waiting:
            requests, self._waiting = self._waiting, []
            try:
                for batch in split_by_length(requests, max_tokens=self._max_batch_tokens):
                    await self._score_batch([request for request in batch if not request.score.done()])
            finally:
                for request in requests:
                    request.score.cancel()  # without effect where it is done; else `close` came, and nobody waits on

    async def _score_batch(self, batch: Sequence[_Request]) -> None:
        if not batch:
            return
        try:
            logits = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._forward, [request.tokens for request in batch]
            )
        except Exception as error:  # out of memory, most likely: told to those who wait
            for request in batch:
                if not request.score.done():
                    request.score.set_exception(error)
            return
        for request, logit in zip(batch, logits, strict=True):
            if not request.score.done():
                request.score.set_result(logit)

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Logits of sequences, padded on the right to the longest."""
        longest = max(map(len, sequences))
        rows = [[*tokens, *[self._pad] * (longest - len(tokens))] for tokens in sequences]
        masks = [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in sequences]
        logits = self._model(
            input_ids=torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(masks, device=self._device),
        ).logits
        return [float(value) for value in logits[:, 0].float().cpu()]

    def _load(self) -> None:
        self._text = GraderText(load_tokenizer(self._path), name=self._path)
        self._model = _load_classifier(self._path, self._dtype).to(self._device).eval()
        config = self._model.config.get_text_config()
        if config.pad_token_id is None:
            raise ConfigError(
                f"the reward model {self._path!r} has no pad token, which batches need; set pad_token_id in its "
                "config.json to the id of a token that responses do not end with"
            )
        self._pad = int(config.pad_token_id)
        positions = getattr(config, "max_position_embeddings", None)
        self._limit = min(limit for limit in (self._max_tokens, positions, sys.maxsize) if limit)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Request:
    tokens: list[int]
    score: asyncio.Future[float]


def split_by_length(requests: Sequence[_Request], *, max_tokens: int) -> list[list[_Request]]:
    """Batches of like length, of at most `max_tokens` with padding (one that is longer alone), shortest first."""
    batches: list[list[_Request]] = []
    for request in sorted(requests, key=lambda request: len(request.tokens)):
        if batches and (len(batches[-1]) + 1) * len(request.tokens) <= max_tokens:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


def _load_classifier(path: str, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        num_labels = AutoConfig.from_pretrained(path).num_labels
        if num_labels != 1:
            raise ConfigError(
                f"the model {path!r} has {num_labels} labels, and a reward model has one; use a model that was trained "
                "as a reward model (num_labels=1)"
            )
        model, report = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        kind = "" if Path(path).is_dir() else " (there is no such folder)"
        raise ConfigError(f"no reward model in {path!r}{kind}: {first}") from error
    if report["missing_keys"]:
        raise ConfigError(
            f"the model {path!r} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}, which would be "
            "random; use a model that was saved with its classification head"
        )
    return model
