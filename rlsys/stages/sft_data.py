"""The data of supervised fine-tuning: what is learned from, what the loss is only measured on, what is too long."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlsys.chat import Chat
from rlsys.config import Config, PlugIn
from rlsys.conversation import to_rollout
from rlsys.demonstrations import Demonstration
from rlsys.errors import DataError
from rlsys.plugins import resolve
from rlsys.stages.common import load_problems
from rlsys.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class SftData:
    """Demonstrations on the token axis; no prompt of `held_out` is one of `train`. `counts` is for people."""

    train: list[Rollout]
    held_out: list[Rollout]
    counts: dict[str, int]

    @property
    def told(self) -> str:
        """The counts in words, zeros left out."""
        return ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in self.counts.items() if count)


def sft_data(config: Config, chat: Chat) -> SftData:
    """Make the demonstrations, hold some out, put them on the token axis.

    Raises:
        DataError: there are none, one trains nothing, or one is too long and that is to be an error.
    """
    stage = config.sft
    assert stage.demonstrations is not None
    train, removed = _made(config, stage.demonstrations, "sft.demonstrations"), 0
    held_out: list[Demonstration] = []
    if stage.held_out is not None:
        held_out = _made(config, stage.held_out, "sft.held_out")
        shared = {beginning_of(demonstration) for demonstration in held_out}
        kept = [demonstration for demonstration in train if beginning_of(demonstration) not in shared]
        train, removed = kept, len(train) - len(kept)
        if not train:
            raise DataError("sft.held_out has the prompt of every demonstration, so nothing is left to learn from")
    elif stage.held_out_share:
        train, held_out = hold_out(train, stage.held_out_share, config.seed)
    learned, lost = _fitting(train, chat, config, "sft.demonstrations")
    measured, lost_held_out = _fitting(held_out, chat, config, "sft.held_out")
    if not learned:
        raise DataError(f"sft.demonstrations: none is left; {lost} are too long (sft.max_tokens)")
    rendered = [d for d in train if d.recorded is not None and d.recorded.template != chat.fingerprint]
    counts = {
        "demonstrations": len(learned),
        "held_out": len(measured),
        "not_learned_from_because_held_out": removed,
        f"too_long_and_{'cut' if stage.too_long == 'cut' else 'dropped'}": lost + lost_held_out,
        "from_text_because_sampled_under_another_chat": len(rendered),
    }
    return SftData(train=learned, held_out=measured, counts=counts)


def _made(config: Config, source: PlugIn, place: str) -> list[Demonstration]:
    make = resolve(source.use, place=f"{place}.use")
    found = list(make(load_problems(config, "train"), **source.options))
    if not found:
        raise DataError(f"{place} gave no demonstration")
    return found


def beginning_of(demonstration: Demonstration) -> str:
    """What tells problems apart, and chats: all up to the first message of the user."""
    prompt = demonstration.problem.prompt
    end = next((index for index, message in enumerate(prompt, 1) if message["role"] == "user"), len(prompt))
    return json.dumps([[message["role"], message["content"]] for message in prompt[:end]], default=str)


def hold_out(
    demonstrations: Sequence[Demonstration], share: float, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(to learn from, to measure on): a share of the prompts with all their demonstrations, the same for one seed."""
    beginnings = sorted(
        {beginning_of(demonstration) for demonstration in demonstrations},
        key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest(),
    )
    if len(beginnings) < 2:
        raise DataError("sft.held_out_share: all demonstrations have one prompt, so none of it can be held out")
    count = min(len(beginnings) - 1, max(1, round(share * len(beginnings))))
    measured = set(beginnings[:count])
    return (
        [demonstration for demonstration in demonstrations if beginning_of(demonstration) not in measured],
        [demonstration for demonstration in demonstrations if beginning_of(demonstration) in measured],
    )


def _fitting(
    demonstrations: Sequence[Demonstration], chat: Chat, config: Config, place: str
) -> tuple[list[Rollout], int]:
    """The rollouts that fit, and how many demonstrations did not."""
    stage = config.sft
    limit = stage.max_tokens or config.actors.max_model_tokens
    rollouts, too_long = [], []
    for demonstration in demonstrations:
        rollout = to_rollout(demonstration, chat)
        if not rollout.num_trained_tokens:
            raise DataError(
                f"{place}: problem {demonstration.problem.id!r}: nothing of its demonstration trains; leave it out (of "
                "samples with `rlsys.filters:length` and `at_least: 1`)"
            )
        if len(rollout) <= limit:
            rollouts.append(rollout)
            continue
        too_long.append((len(rollout), demonstration.problem.id))
        if stage.too_long == "cut" and rollout.loss_mask[:limit].any():
            rollouts.append(cut(rollout, limit))
    if too_long and stage.too_long == "error":
        longest, problem = max(too_long)
        setting = "sft.max_tokens" if stage.max_tokens else "actors.max_model_tokens, as sft.max_tokens is not set"
        raise DataError(
            f"{place}: {len(too_long)} of {len(demonstrations)} exceed {limit} tokens ({setting}); the longest, "
            f"of problem {problem!r}, has {longest}; raise the limit, or set sft.too_long to drop or cut"
        )
    return rollouts, len(too_long)


def cut(rollout: Rollout, limit: int) -> Rollout:
    """The first `limit` tokens."""
    return replace(
        rollout,
        **{name: getattr(rollout, name)[:limit] for name in ("tokens", "loss_mask", "logprobs", "versions")},
    )
