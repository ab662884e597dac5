"""Preference learning: pairs of answers of which one is better; and a reward model from the same kind of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlsys.chat import load_tokenizer
from rlsys.config import Config, PlugIn, PreferenceConfig
from rlsys.demonstrations import Demonstration
from rlsys.errors import DataError
from rlsys.grader_text import GraderText
from rlsys.learner_group import LearnerGroup
from rlsys.length_report import write_report
from rlsys.pair_tokens import PairRollouts, hold_out, on_tokens, told
from rlsys.pairs import (
    PairList,
    PreferencePair,
    by_label,
    over_labelled,
    over_pairs,
    over_scored_pairs,
    pair_batch,
    with_end,
)
from rlsys.plugins import resolve
from rlsys.preference import kto
from rlsys.run_chat import run_chat
from rlsys.stages.common import Run, load_problems
from rlsys.stages.offline import Offline, StepData, num_steps, of_step, to_rollout, train_offline
from rlsys.stages.pair_batches import LabelledData, PairData, Reference
from rlsys.types import Rollout

_SHOWN = ("loss", "accuracy", "reward_margin", "held_out_accuracy", "lr")
_SHOWN_LABELS = ("loss", "reward_desirable", "reward_undesirable", "held_out_accuracy", "lr")
_SUMMED_UP = ("accuracy", "held_out_accuracy", "held_out_reward_margin")


class Observer(Protocol):
    """Who is told while pairs are learned from: before the first step, behind each (what it returns is logged with the
    step), and behind the last one, before the model is written."""

    async def begin(self, learners: LearnerGroup) -> None: ...
    async def step(self, step: int, learners: LearnerGroup) -> Mapping[str, float]: ...
    async def finish(self, step: int, learners: LearnerGroup) -> None: ...


async def preference(run: Run, model: Path) -> Path:
    """Learn from pairs; the model that the stage began with is the reference."""
    stage = run.config.preference
    assert stage.pairs is not None
    pairs = _load_pairs(run.config, stage.pairs, place="preference.pairs")
    left, metrics = await train_on_pairs(run, model, pairs, stage=stage, name="preference")
    _sum_up(run, "preference", metrics)
    return left


async def train_on_pairs(
    run: Run,
    model: Path,
    pairs: Sequence[PreferencePair],
    *,
    stage: PreferenceConfig,
    name: str,
    observer: Observer | None = None,
) -> tuple[Path, dict[str, float]]:
    """Learn from these pairs as `stage` says, in the folder `RUN/name`; returns the model left and the last metrics.

    The reference's log-probs are computed once, before the first step, while the learner still holds `model`: no second
    model is kept. They are saved, so a resumed run goes on with the same numbers. An `observer` is told of it.
    """
    config, place = run.config, f"{name}.pairs"
    limit = stage.max_tokens or config.actors.max_model_tokens
    loss = resolve(stage.loss, place=f"{name}.loss")
    chat = await run_chat(config, str(model))
    made = on_tokens(
        pairs, partial(to_rollout, chat=chat), chat=chat, limit=limit, too_long=stage.too_long, place=place
    )
    learned, held_out = hold_out(made.rollouts, stage.held_out_share, config.seed, place=place)
    _report(run, name, made.rollouts, {**_counts_of(pairs), **made.counts, "held_out_pairs": len(held_out)})
    reference = Reference(run.directory.stage(name) / "reference.npz", model, run.console.say)
    given: dict[str, Any] = {"stage": stage, "reference": reference, "seed": config.seed}
    steps = num_steps(stage, len(learned), stage.pairs_per_step)
    if loss is kto:
        data: PairData = LabelledData(learned, held_out, limit=limit, place=place, **given)
        token_loss: Any = partial(over_labelled, beta=stage.beta)
    else:
        data = PairData(learned, held_out, loss=loss, **given)
        token_loss = partial(
            over_pairs,
            loss=loss,
            beta=stage.beta,
            label_smoothing=stage.label_smoothing,
            gamma=stage.gamma,
            nll_coef=stage.nll_coef,
        )

    async def measure(step: int, learners: LearnerGroup) -> Mapping[str, float]:
        now = step == steps or (stage.held_out_every and step % stage.held_out_every == 0)
        seen = {} if observer is None else await observer.step(step, learners)
        epoch = step * stage.pairs_per_step / len(learned)
        return {"epoch": epoch, **(await data.measured(learners) if now else {}), **seen}

    async def prepare(learners: LearnerGroup) -> None:
        await data.prepare(learners)
        if observer is not None:
            await observer.begin(learners)

    return await train_offline(
        run,
        model,
        Offline(
            name=name,
            schedule=stage,
            steps=steps,
            loss=token_loss,
            batch=data.batch,
            prepare=prepare,
            measure=measure,
            finish=None if observer is None else observer.finish,
            refine=by_label if loss is kto else dict,
            shown=_SHOWN_LABELS if loss is kto else _SHOWN,
        ),
    )


async def reward_model(run: Run, model: Path) -> Path:
    """Train a scorer on pairs (Bradley-Terry) and leave it in the stage's folder; the policy stays what it was."""
    config, stage, place = run.config, run.config.reward_model, "reward_model.pairs"
    assert stage.pairs is not None
    pairs = _load_pairs(config, stage.pairs, place=place)
    made = on_tokens(
        pairs,
        as_graded(model),
        chat=None,
        limit=config.actors.max_model_tokens,
        too_long=stage.too_long,
        place=place,
    )
    _report(run, "reward_model", made.rollouts, {**_counts_of(pairs), **made.counts})
    items = made.rollouts

    async def batch(step: int, _learners: LearnerGroup) -> StepData:
        found = of_step(items, step, stage.pairs_per_step, config.seed)
        return pair_batch([pair[:2] for pair in found], margins=[pair.margin for pair in found]), {}

    _, metrics = await train_offline(
        run,
        model,
        Offline(
            name="reward_model",
            schedule=stage,
            steps=num_steps(stage, len(items), stage.pairs_per_step),
            loss=over_scored_pairs,
            batch=batch,
            shown=_SHOWN,
            network="scorer",
        ),
    )
    _sum_up(run, "reward_model", metrics)
    return model


def _load_pairs(config: Config, source: PlugIn, *, place: str) -> Sequence[PreferencePair]:
    make = resolve(source.use, place=f"{place}.use")
    pairs: Sequence[PreferencePair] = make(load_problems(config, "train"), **source.options)
    if not pairs:
        raise DataError(f"{place} gave no pair")
    return pairs


def as_graded(model: Path) -> Any:
    """An answer as the reward model will read it: it cannot give orders, and the template ends behind it."""
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

    return rollout


def _counts_of(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    """What the source of the pairs left out, where it says so."""
    return dict(pairs.counts) if isinstance(pairs, PairList) else {}


def _report(run: Run, name: str, rollouts: Sequence[PairRollouts], counts: Mapping[str, int]) -> None:
    """Write what the pairs are, before anything is learned from them, and say it."""
    report = write_report(run.directory.stage(name), rollouts, counts)
    lengths = report["lengths"]
    run.console.say(
        f"{name}: {len(rollouts)} pairs, chosen {lengths['chosen']['median']:.0f} and rejected "
        f"{lengths['rejected']['median']:.0f} tokens (medians); {told(counts)}"
    )


def _sum_up(run: Run, name: str, metrics: Mapping[str, float]) -> None:
    run.directory.update_summary(**{f"{name}_{key}": metrics[key] for key in _SUMMED_UP if key in metrics})
