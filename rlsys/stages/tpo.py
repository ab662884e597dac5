"""Iterated Thought Preference Optimization (arXiv 2410.10630), with hidden thoughts or without: see docs/tpo.md.

An iteration samples answers to fresh problems, lets the run's rewards judge them, makes best-against-worst pairs,
learns from these with the model that it began with as the reference, and keeps the weights of the best validation
score. The engines live through all iterations; each has learners of its own. Iteration i writes into `RUN/tpo_i` and
logs its steps under `tpo_i`; what came of it is the line `tpo` of step i, where step 0 is the model before the first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlsys.chat import Chat
from rlsys.errors import DataError, TrainingStalledError
from rlsys.fleet import RolloutFleet
from rlsys.pairs import PreferencePair
from rlsys.run_chat import run_chat
from rlsys.samples import Sample, write_samples
from rlsys.stages.common import Run, load_problems, record_isolation
from rlsys.stages.preference import train_on_pairs
from rlsys.stages.tpo_answers import Answered, collect_answers
from rlsys.stages.tpo_keeper import Keeper, Yardstick
from rlsys.thoughts import FAILURE, MEASURED
from rlsys.tpo import Candidate, Selection, balance
from rlsys.tpo_report import plot_iterations
from rlsys.types import Problem


async def tpo(run: Run, model: Path) -> Path:
    """All iterations that are not finished; leaves the model with the best validation score, the first one included."""
    config, directory = run.config, run.directory
    validation, fresh = divide(run)
    held_out = load_problems(config, "held_out")
    models = [model]
    while (finished := directory.finished_model(name_of(len(models)))) is not None:
        models.append(finished)
    done = len(models) - 1
    measured_before = any(line["step"] == 0 for line in directory.metrics("tpo"))
    directory.forget_after("tpo", done if measured_before else -1)
    if done < config.tpo.iterations:
        async with AsyncExitStack() as stack:
            with run.console.waiting(f"starting {config.actors.count} rollout engines with {models[-1]}"):
                fleet = await RolloutFleet.start(config, str(models[-1]))
            stack.push_async_callback(fleet.close)
            await record_isolation(run, fleet)
            await fleet.begin_at(done)
            chat = await run_chat(config, str(model))
            yardstick = Yardstick(run, fleet, chat, validation, held_out)
            if not measured_before:
                directory.log("tpo", 0, await yardstick.of_stage(0, await yardstick.validate("tpo", 0)))
            stage = _Stage(run=run, fleet=fleet, yardstick=yardstick, chat=chat)
            for number in range(done + 1, config.tpo.iterations + 1):
                models.append(await stage.iterate(number, models[-1], fresh[number - 1]))
                plot_iterations(directory)
    lines = {int(line["step"]): line for line in directory.metrics("tpo")}
    best = max(range(len(models)), key=lambda number: float(lines[number]["validation_score"]))
    directory.update_summary(
        tpo_best_iteration=best,
        tpo_accuracy_before=lines[0]["held_out_accuracy"],
        tpo_accuracy_after=lines[best]["held_out_accuracy"],
    )
    run.console.say(f"tpo: the best validation score is that of iteration {best}, whose model is left")
    return models[best]


def name_of(number: int) -> str:
    """Under which iteration `number` (from 1) logs its steps, and the name of its folder."""
    return f"tpo_{number}"


def divide(run: Run) -> tuple[list[Problem], list[list[Problem]]]:
    """The problems for validation, and those of each iteration, in a random order; no prompt or id is there twice.

    Raises:
        DataError: there are not enough.
    """
    stage = run.config.tpo
    by_prompt = {json.dumps(problem.prompt, default=dict): problem for problem in load_problems(run.config, "train")}
    problems = list({problem.id: problem for problem in by_prompt.values()}.values())
    if len(problems) < stage.problems_needed:
        raise DataError(
            f"tpo needs {stage.problems_needed} different problems ({stage.iterations} iterations x "
            f"{stage.problems_per_iteration}, none of them twice, and {stage.validation_problems} for validation), but "
            f"data.train has {len(problems)}; give it more, or lower tpo.problems_per_iteration or tpo.iterations"
        )
    order = np.random.default_rng([run.config.seed, stage.validation_problems]).permutation(len(problems))
    shuffled = [problems[index] for index in order.tolist()]
    validation, rest = shuffled[: stage.validation_problems], shuffled[stage.validation_problems :]
    size = stage.problems_per_iteration
    return validation, [rest[number * size : (number + 1) * size] for number in range(stage.iterations)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What all iterations share."""

    run: Run
    fleet: RolloutFleet
    yardstick: Yardstick
    chat: Chat

    async def iterate(self, number: int, model: Path, problems: Sequence[Problem]) -> Path:
        """One iteration, from where it was left; returns the folder of its best weights. The engines hold them then."""
        run, stage, name = self.run, self.run.config.tpo, name_of(number)
        folder = run.directory.stage(name)
        answers = await collect_answers(run, self.fleet, problems, self.chat, name=name, model=model)
        selection = balance(
            [_candidates(samples) for samples in answers.by_problem],
            most=stage.max_length_weight,
            step=stage.length_weight_step,
        )
        counts = _counts(answers, selection)
        pairs = _pairs(answers, selection, name)
        write_samples(folder / "pairs.parquet", _of_pairs(answers, selection))
        run.console.say(
            f"{name}: {len(pairs)} pairs of {len(problems)} problems, length weight {selection.length_weight:g}"
            + ("" if selection.balanced else " (chosen responses are longer all the same)")
        )
        keeper = Keeper(run, self.fleet, self.yardstick, number=number, name=name, num_pairs=len(pairs))
        left, _ = await train_on_pairs(run, model, pairs, stage=stage.learning, name=name, observer=keeper)
        run.directory.log("tpo", number, {**counts, **keeper.result})
        run.directory.finish(name, left)
        for unneeded in ("checkpoints", "best"):
            shutil.rmtree(folder / unneeded, ignore_errors=True)
        return left


def _candidates(samples: Sequence[Sample]) -> list[Candidate]:
    return [
        Candidate(
            text=sample.text,
            score=None if sample.metrics.get(FAILURE) else sample.reward,
            length=int(sample.metrics.get("shown_tokens", sample.num_tokens)),
        )
        for sample in samples
    ]


def _pairs(answers: Answered, selection: Selection, name: str) -> list[PreferencePair]:
    """Best against worst, on the ids that were generated.

    Raises:
        TrainingStalledError: no problem gives a pair; says why.
    """
    pairs = []
    for samples, choice in zip(answers.by_problem, selection.choices, strict=True):
        if choice is not None:
            chosen, rejected = samples[choice.chosen], samples[choice.rejected]
            pairs.append(
                PreferencePair(
                    problem=chosen.problem,
                    chosen=chosen.demonstration.segments,
                    rejected=rejected.demonstration.segments,
                    chosen_recorded=chosen.demonstration.recorded,
                    rejected_recorded=rejected.demonstration.recorded,
                )
            )
    if not pairs:
        why = ", ".join(f"{count} {reason}" for reason, count in selection.dropped.most_common())
        raise TrainingStalledError(
            f"{name}: none of {len(answers.by_problem)} problems gave a pair ({why}; answers missing: "
            f"{dict(answers.dropped) or 'none'}). Use problems that the policy answers well only sometimes, more "
            "tpo.samples_per_problem, a higher temperature, or a judge that tells answers apart"
        )
    return pairs


def _of_pairs(answers: Answered, selection: Selection) -> list[Sample]:
    """Both sides of every pair, one after the other, with their side in the provenance: for people to read."""
    found = []
    for samples, choice in zip(answers.by_problem, selection.choices, strict=True):
        for side in () if choice is None else ("chosen", "rejected"):
            sample = samples[getattr(choice, side)]
            found.append(replace(sample, provenance={**sample.provenance, "side": side}))
    return found


def _counts(answers: Answered, selection: Selection) -> dict[str, float]:
    """What the answers and the pairs of an iteration are."""
    samples = [sample for group in answers.by_problem for sample in group]
    judged = [sample for sample in samples if not sample.metrics.get(FAILURE)]
    sides = [
        (group[choice.chosen], group[choice.rejected])
        for group, choice in zip(answers.by_problem, selection.choices, strict=True)
        if choice is not None
    ]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    return {
        "problems": float(len(answers.by_problem)),
        "answers": float(len(samples)),
        "score": mean([sample.reward for sample in judged]),
        "accuracy": mean([float(bool(sample.correct)) for sample in samples]),
        "answer_tokens": mean([sample.num_tokens for sample in samples]),
        **_thought_means(samples),
        "length_weight": selection.length_weight,
        "balanced": float(selection.balanced),
        "chosen_length": selection.chosen_length,
        "rejected_length": selection.rejected_length,
        "chosen_answer_tokens": mean([chosen.num_tokens for chosen, _ in sides]),
        "rejected_answer_tokens": mean([rejected.num_tokens for _, rejected in sides]),
        "chosen_score": mean([chosen.reward for chosen, _ in sides]),
        "rejected_score": mean([rejected.reward for _, rejected in sides]),
        "pairs": float(len(sides)),
        "pairs_with_parse_failure": float(sum(bool(rejected.metrics.get(FAILURE)) for _, rejected in sides)),
        **{f"dropped_pairs/{reason}": float(count) for reason, count in sorted(selection.dropped.items())},
        **{f"dropped/{kind}": float(count) for kind, count in sorted(answers.dropped.items())},
    }


def _thought_means(samples: Sequence[Sample]) -> Mapping[str, float]:
    found = [sample.metrics for sample in samples if FAILURE in sample.metrics]
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in MEASURED if found}
