"""Preference pairs on the token axis: as they were recorded, or from their text, but never half this and half that."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from rlsys.chat import Chat
from rlsys.demonstrations import Demonstration
from rlsys.errors import DataError
from rlsys.pairs import PreferencePair
from rlsys.types import Rollout

TooLong = Literal["error", "drop"]
Render = Callable[[Demonstration], Rollout]


class PairRollouts(NamedTuple):
    """Chosen and rejected of one pair, and how much better the first is."""

    chosen: Rollout
    rejected: Rollout
    margin: float = 0.0

    @property
    def prompt(self) -> bytes:
        """What stands before the first trained token: the same for both."""
        return prompt_of(self.chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPairs:
    """Pairs that can train, and what came of the others: counts by a name such as `removed/too_long`."""

    rollouts: list[PairRollouts]
    counts: dict[str, int] = field(default_factory=dict)


def prompt_of(rollout: Rollout) -> bytes:
    """The token ids before the first one that trains, as a key."""
    return rollout.tokens[: int(rollout.loss_mask.argmax())].tobytes()


def recorded_or_rendered(pair: PreferencePair, chat: Chat) -> tuple[tuple[Demonstration, Demonstration], str]:
    """The two answers as they are to be put on tokens, and in which way.

    `recorded`: both train on the ids that were generated, because both were recorded under this chat and behind the
    same prompt. In all other cases both are rendered from text: `text` where nothing was recorded, `other_template`
    where both were under another chat, `mixed` where the two sides differ in this, `other_prompt` where the recorded
    prompts do.
    """
    sides = pair.demonstrations
    templates = [None if side.recorded is None else side.recorded.template for side in sides]
    if templates == [chat.fingerprint] * 2:
        prompts = [
            side.recorded.tokens[: int(side.recorded.loss_mask.argmax())].tobytes() for side in sides if side.recorded
        ]
        if prompts[0] == prompts[1]:
            return sides, "recorded"
        way = "other_prompt"
    elif templates == [None, None]:
        way = "text"
    else:
        way = "other_template" if templates[0] == templates[1] else "mixed"
    return (replace(sides[0], recorded=None), replace(sides[1], recorded=None)), way


def on_tokens(
    pairs: Sequence[PreferencePair], render: Render, *, chat: Chat | None, limit: int, too_long: TooLong, place: str
) -> TokenPairs:
    """All pairs as rollouts; those with a side of more than `limit` tokens are an error, or dropped and counted.

    Without `chat` nothing was recorded that could train: all are rendered from text.

    Raises:
        DataError: names the problem of a pair that is too long or has two prompts; or none is left.
    """
    counts: Counter[str] = Counter()
    found = []
    for pair in pairs:
        sides, way = (pair.demonstrations, "text") if chat is None else recorded_or_rendered(pair, chat)
        chosen, rejected = map(render, sides)
        if (longest := max(len(chosen), len(rejected))) > limit:
            if too_long == "error":
                raise DataError(
                    f"{place}: a pair of problem {pair.problem.id!r} has {longest} tokens, more than the limit of "
                    f"{limit} (max_tokens, or actors.max_model_tokens); raise it, or set too_long: drop"
                )
            counts["removed/too_long"] += 1
            continue
        if prompt_of(chosen) != prompt_of(rejected):
            raise DataError(
                f"{place}: the two answers of problem {pair.problem.id!r} do not begin to train at the same place; "
                "let both have the same untrained text in front, or none"
            )
        counts[f"tokens/{way}"] += 1
        found.append(PairRollouts(chosen, rejected, pair.margin))
    if not found:
        raise DataError(
            f"{place}: none of {len(pairs)} pairs fits into {limit} tokens (max_tokens, or actors.max_model_tokens)"
        )
    return TokenPairs(rollouts=found, counts=dict(counts))


def hold_out(
    pairs: Sequence[PairRollouts], share: float, seed: int, *, place: str
) -> tuple[list[PairRollouts], list[PairRollouts]]:
    """Pairs to learn from, and those of a share of the prompts, at least one, that are only measured on.

    Raises:
        DataError: there is one prompt only, or nothing is left to learn from.
    """
    if not share:
        return list(pairs), []
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(share * len(prompts)))])
    parts: tuple[list[PairRollouts], list[PairRollouts]] = ([], [])
    for pair in pairs:
        parts[pair.prompt in held].append(pair)
    if not parts[0]:
        raise DataError(
            f"{place}: held_out_share={share:g} leaves nothing to learn from, of {len(pairs)} pairs with "
            f"{len(prompts)} different prompts; lower it, or give more problems"
        )
    return parts


def mismatched(prompt: Rollout, answer: Rollout) -> Rollout:
    """The prompt of one rollout with what was written after that of another."""
    begin, end = int(answer.loss_mask.argmax()), int(prompt.loss_mask.argmax())
    return Rollout(
        **{
            name: np.concatenate([getattr(prompt, name)[:end], getattr(answer, name)[begin:]])
            for name in ("tokens", "loss_mask", "logprobs", "versions")
        }
    )


def mismatches(pairs: Sequence[PairRollouts], *, limit: int, place: str) -> list[Rollout]:
    """For each pair its prompt with the chosen answer to another prompt: the next one with which it fits `limit`.

    Raises:
        DataError: all pairs have one prompt, or no other answer fits behind one.
    """
    prompts = [pair.prompt for pair in pairs]
    if len(set(prompts)) < 2:
        raise DataError(
            f"{place}: KTO measures its baseline on answers to other problems, but all {len(pairs)} pairs have one "
            "prompt; give pairs of two problems at least, or take another preference.loss"
        )
    found = []
    for index, pair in enumerate(pairs):
        room = limit - len(pair.prompt) // pair.chosen.tokens.itemsize
        for distance in range(1, len(pairs)):
            other = (index + distance) % len(pairs)
            answer = pairs[other].chosen
            if prompts[other] != prompts[index] and len(answer) - int(answer.loss_mask.argmax()) <= room:
                found.append(mismatched(pair.chosen, answer))
                break
        else:
            raise DataError(
                f"{place}: no answer to another problem fits behind the prompt of pair {index} within {limit} tokens "
                "(max_tokens, or actors.max_model_tokens), and KTO measures its baseline on such; raise it"
            )
    return found


def told(counts: Mapping[str, int]) -> str:
    """Counts in one line, for people."""
    return ", ".join(f"{name.replace('removed/', 'left out: ')} {count}" for name, count in counts.items())
