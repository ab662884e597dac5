"""Preference learning: pairs of answers of which one is better; and a reward model from the same kind of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.chat import Chat, load_tokenizer
from rlsys.config import Config, PlugIn
from rlsys.demonstrations import Demonstration
from rlsys.errors import DataError
from rlsys.fleet import LearnerGroup
from rlsys.grader_text import GraderText
from rlsys.pairs import (
    PreferencePair,
    labelled_batch,
    over_labelled,
    over_pairs,
    over_scored_pairs,
    pair_batch,
    with_end,
    with_logprobs,
)
from rlsys.plugins import resolve
from rlsys.preference import kto
from rlsys.stages.common import Run, load_problems
from rlsys.stages.offline import Offline, StepData, of_step, to_rollout, train_offline
from rlsys.types import Rollout, TrainBatch

_REFERENCE = "reference.npz"
_AT_A_TIME = 256
"""Rollouts whose reference log-probs are computed in one call."""

_SHOWN = ("loss", "accuracy", "reward_margin", "lr")


async def preference(run: Run, model: Path) -> Path:
    """Learn from pairs; the model that the stage began with is the reference.

    The reference's log-probs are computed once, before the first step, while the learner still holds that model: no
    second model is kept. They are saved, so a resumed run goes on with the same numbers.
    """
    config, stage = run.config, run.config.preference
    assert stage.pairs is not None
    loss = resolve(stage.loss, place="preference.loss")
    pairs = _load_pairs(config, stage.pairs, place="preference.pairs")
    rollouts = _rollouts(pairs, Chat.load(str(model), [], config.chat), config.actors.max_model_tokens)
    if loss is kto:
        data: Any = _LabelledData(run, rollouts)
        token_loss = partial(over_labelled, beta=stage.beta)
        shown: Sequence[str] = ("loss", "reward_desirable", "reward_undesirable", "lr")
    else:
        data, shown = _PairData(run, rollouts), _SHOWN
        token_loss = partial(
            over_pairs,
            loss=loss,
            beta=stage.beta,
            label_smoothing=stage.label_smoothing,
            gamma=stage.gamma,
            nll_coef=stage.nll_coef,
        )
    left, metrics = await train_offline(
        run,
        model,
        Offline(
            name="preference", schedule=stage, loss=token_loss, batch=data.batch, prepare=data.prepare, shown=shown
        ),
    )
    run.directory.update_summary(**{f"preference_{name}": metrics[name] for name in ("accuracy",) if name in metrics})
    return left


async def reward_model(run: Run, model: Path) -> Path:
    """Train a scorer on pairs (Bradley-Terry) and leave it in the stage's folder; the policy stays what it was."""
    config, stage = run.config, run.config.reward_model
    assert stage.pairs is not None
    pairs = _load_pairs(config, stage.pairs, place="reward_model.pairs")
    items = list(zip(_graded(pairs, model, config), [pair.margin for pair in pairs], strict=True))

    async def batch(step: int, _learners: LearnerGroup) -> StepData:
        found = of_step(items, step, stage.pairs_per_step, config.seed)
        return pair_batch([pair for pair, _ in found], margins=[margin for _, margin in found]), {}

    _, metrics = await train_offline(
        run,
        model,
        Offline(
            name="reward_model",
            schedule=stage,
            loss=over_scored_pairs,
            batch=batch,
            shown=_SHOWN,
            network="scorer",
        ),
    )
    run.directory.update_summary(**{f"reward_model_{n}": metrics[n] for n in ("accuracy",) if n in metrics})
    return model


def _load_pairs(config: Config, source: PlugIn, *, place: str) -> list[PreferencePair]:
    make = resolve(source.use, place=f"{place}.use")
    pairs: list[PreferencePair] = make(load_problems(config, "train"), **source.options)
    if not pairs:
        raise DataError(f"{place} gave no pair")
    return pairs


def _rollouts(pairs: Sequence[PreferencePair], chat: Chat, limit: int) -> list[tuple[Rollout, Rollout]]:
    """Chosen and rejected of every pair on the token axis."""
    found = []
    for pair in pairs:
        chosen, rejected = (to_rollout(demonstration, chat) for demonstration in pair.demonstrations)
        _check_length(pair, chosen, rejected, limit)
        found.append((chosen, rejected))
    return found


def _graded(pairs: Sequence[PreferencePair], model: Path, config: Config) -> list[tuple[Rollout, Rollout]]:
    """The same as the reward model will read them: the answer cannot give orders, the template ends behind it."""
    text = GraderText(load_tokenizer(str(model)), name=str(model))

    def rollout(demonstration: Demonstration) -> Rollout:
        before, rest = text.render(demonstration.problem, demonstration.text)
        tokens = np.array([*before, *rest], np.int32)
        return with_end(
            Rollout(
                tokens=tokens,
                loss_mask=np.arange(len(tokens)) >= len(before),
                logprobs=np.zeros(len(tokens), np.float32),
                versions=np.full(len(tokens), -1, np.int32),
            )
        )

    found = []
    for pair in pairs:
        chosen, rejected = map(rollout, pair.demonstrations)
        _check_length(pair, chosen, rejected, config.actors.max_model_tokens)
        found.append((chosen, rejected))
    return found


def _check_length(pair: PreferencePair, chosen: Rollout, rejected: Rollout, limit: int) -> None:
    if (longest := max(len(chosen), len(rejected))) > limit:
        raise DataError(
            f"a pair of problem {pair.problem.id!r} has {longest} tokens, more than the context of {limit} "
            "(actors.max_model_tokens); leave it out or raise the context"
        )


class _PairData:
    """Batches of pairs that carry the reference's log-probs."""

    def __init__(self, run: Run, pairs: Sequence[tuple[Rollout, Rollout]]) -> None:
        self._run, self._pairs, self._stage = run, list(pairs), run.config.preference

    async def prepare(self, learners: LearnerGroup) -> None:
        """Compute the reference's log-probs, or read what was computed before."""
        flat = [rollout for pair in self._pairs for rollout in pair]
        flat = await _with_reference(flat, learners, self._run.directory.stage("preference") / _REFERENCE)
        self._pairs = list(zip(flat[0::2], flat[1::2], strict=True))

    async def batch(self, step: int, _learners: LearnerGroup) -> StepData:
        """The pairs of this step."""
        return pair_batch(of_step(self._pairs, step, self._stage.pairs_per_step, self._run.config.seed)), {}


class _LabelledData:
    """Both answers of each pair with a label of its own, and each problem with the answer to another one.

    The last is what KTO measures its baseline on, with the current policy and over the whole batch.
    """

    def __init__(self, run: Run, pairs: Sequence[tuple[Rollout, Rollout]]) -> None:
        self._run, self._stage = run, run.config.preference
        self._pairs = [
            (*pair, mismatched(pair[0], other[0])) for pair, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]

    async def prepare(self, learners: LearnerGroup) -> None:
        """Compute the reference's log-probs, or read what was computed before."""
        flat = [rollout for three in self._pairs for rollout in three]
        flat = await _with_reference(flat, learners, self._run.directory.stage("preference") / _REFERENCE)
        self._pairs = list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))

    async def batch(self, step: int, learners: LearnerGroup) -> StepData:
        """The answers of this step, and the baseline."""
        found = of_step(self._pairs, step, self._stage.pairs_per_step, self._run.config.seed)
        others = [three[2] for three in found]
        current = await learners.infer(_unlearned(others), temperature=1.0)
        ratios = [
            float(logprobs.sum() - rollout.logprobs.sum()) for logprobs, rollout in zip(current, others, strict=True)
        ]
        answers = [rollout for three in found for rollout in three[:2]]
        return labelled_batch(answers, [True, False] * len(found)), {"kl_baseline": max(0.0, float(np.mean(ratios)))}


def mismatched(prompt: Rollout, answer: Rollout) -> Rollout:
    """The prompt of one rollout with what was written after that of another."""
    begin, end = int(answer.loss_mask.argmax()), int(prompt.loss_mask.argmax())
    return Rollout(
        **{
            name: np.concatenate([getattr(prompt, name)[:end], getattr(answer, name)[begin:]])
            for name in ("tokens", "loss_mask", "logprobs", "versions")
        }
    )


async def _with_reference(rollouts: Sequence[Rollout], learners: LearnerGroup, path: Path) -> list[Rollout]:
    """The rollouts with the log-probs of the model that the learner holds now, or of the one that was asked before."""
    total = sum(map(len, rollouts))
    if path.exists():
        flat = np.load(path)["logprobs"]
        if len(flat) != total:
            raise DataError(
                f"{path} has {len(flat)} log-probs for {total} tokens; the pairs changed: begin anew with --fresh"
            )
    else:
        parts = []
        for first in range(0, len(rollouts), _AT_A_TIME):
            parts += await learners.infer(_unlearned(rollouts[first : first + _AT_A_TIME]), temperature=1.0)
        flat = np.concatenate(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".partial.npz")
        np.savez(partial_path, logprobs=flat)
        partial_path.replace(path)
    cuts = np.cumsum([len(rollout) for rollout in rollouts])[:-1]
    return [with_logprobs(rollout, found) for rollout, found in zip(rollouts, np.split(flat, cuts), strict=True)]


def _unlearned(rollouts: Sequence[Rollout]) -> TrainBatch:
    """A batch to be looked at only."""
    return replace(labelled_batch(rollouts, [True] * len(rollouts)), num_tokens=1)
