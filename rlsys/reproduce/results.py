"""What the runs of an experiment measured: numbers by variant and seed, means, and how comparisons came out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlsys.errors import ConfigError, DataError
from rlsys.records import RunDirectory
from rlsys.reproduce.statistics import Estimate, Verdict, estimate, verdict
from rlsys.tables import did_you_mean

EVALUATION = (
    *("accuracy", "reward", "response_tokens", "completed_ratio", "tool_rate", "tool_calls", "tool_error_rate"),
    *("problems", "not_measured", "accuracy_greedy"),
)
"""What every evaluation says; besides these it has families of measures, such as `reward/TERM`."""

_COUNTED = ("dropped/", "dropped_groups/", "status/")
"""Counts that stand in the log only where there was one: absent is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A run that did not come to its end, or did not say what it was to be asked."""

    run: str
    seed: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """How one comparison came out: the difference `better - than`, paired by seed, and what it says."""

    better: str
    than: str
    measure: str
    differences: Mapping[int, float]
    estimate: Estimate | None
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that came out of an experiment."""

    name: str
    claim: str
    paper: Sequence[str]
    seeds: Sequence[int]
    values: Mapping[str, Mapping[str, Mapping[int, float]]]
    """The number by variant, measure and seed."""
    findings: Sequence[Finding]
    seconds: Mapping[str, Mapping[int, float]]
    """Wall seconds of each run, by its name and seed, all attempts together."""
    failures: Sequence[Failure]

    @property
    def measures(self) -> list[str]:
        """The columns, in order."""
        return list(next(iter(self.values.values())))

    @property
    def wall_seconds(self) -> float:
        """Of all runs together."""
        return round(sum(sum(by_seed.values()) for by_seed in self.seconds.values()), 1)

    def estimate(self, variant: str, measure: str) -> Estimate | None:
        """Mean over seeds."""
        return estimate(list(self.values[variant][measure].values()))


def check_measure(measure: str) -> None:
    """Refuse what no run can say; what a stage other than the evaluation logs is known only afterwards.

    Raises:
        ConfigError: names the nearest measure that exists.
    """
    parts = measure.split(":")
    if len(parts) == 1 and "/" not in measure and measure not in EVALUATION:
        near = difflib.get_close_matches(measure, EVALUATION, n=1)
        raise ConfigError(
            f"measures: unknown measure {measure!r}{did_you_mean(near)}; an evaluation has {', '.join(EVALUATION)}, "
            "reward/TERM and status/TERM/STATUS; for another line of metrics.jsonl write STAGE:KEY, as in rl:reward"
        )
    if len(parts) > 3 or not all(parts) or not (parts[2:] in ([], ["mean"], ["last"]) or parts[2].isdecimal()):
        raise ConfigError(
            f"measures: {measure!r} is not KEY, STAGE:KEY, STAGE:KEY:last, STAGE:KEY:mean or STAGE:KEY:STEP"
        )


def measured(directory: RunDirectory, measure: str) -> float:
    """One number of a run, from its metrics.jsonl.

    `accuracy` is that of the last evaluation, in whichever stage it was made; `rl:reward` that of the last line of the
    stage `rl`, `rl:reward:mean` the mean over all its lines, such as the reward over the whole of training, and
    `rl:reward:3` that of the line of step 3.

    Raises:
        DataError: the run has no such line, it lacks the key, or the number is not finite.
    """
    stage, key, which = _parsed(measure)
    lines = directory.evaluations() if stage is None else directory.metrics(stage)
    if which.isdecimal():
        lines = [line for line in lines if line["step"] == int(which)]
    if not lines:
        what = "evaluation" if stage is None else f"line of the stage {stage!r}"
        of_step = f" and step {which}" if which.isdecimal() else ""
        raise DataError(f"{directory.folder}/metrics.jsonl has no {what}{of_step} to read {measure!r} from")
    absent = 0.0 if key.startswith(_COUNTED) else None
    numbers: list[Any] = [line.get(key, absent) for line in (lines if which == "mean" else lines[-1:])]
    there = [float(number) for number in numbers if number is not None]
    if not there:
        near = difflib.get_close_matches(key, lines[-1], n=1)
        raise DataError(f"{directory.folder}/metrics.jsonl: the line has no {key!r}{did_you_mean(near)}")
    if not math.isfinite(found := fmean(there)):
        raise DataError(f"{directory.folder}/metrics.jsonl: {measure!r} is {found}")
    return found


def _parsed(measure: str) -> tuple[str | None, str, str]:
    """Stage (None: the evaluation), key, and which line: `last`, `mean` or a step."""
    parts = measure.split(":")
    return (None, measure, "last") if len(parts) == 1 else (parts[0], parts[1], (*parts[2:], "last")[0])


def compared(better: str, than: str, measure: str, values: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Finding:
    """The difference of two variants in a measure over the seeds that both have."""
    more, less = values[better][measure], values[than][measure]
    differences = {seed: more[seed] - less[seed] for seed in more if seed in less}
    found = estimate(list(differences.values()))
    return Finding(
        better=better, than=than, measure=measure, differences=differences, estimate=found, verdict=verdict(found)
    )


def to_json(results: Results) -> dict[str, Any]:
    """Everything, every seed's number included, as JSON holds it."""

    def numbers(found: Estimate | None) -> dict[str, Any]:
        return {} if found is None else {"mean": found.mean, "half_width": found.half_width, "seeds": found.count}

    return {
        "name": results.name,
        "claim": results.claim,
        "paper": list(results.paper),
        "seeds": list(results.seeds),
        "wall_seconds": results.wall_seconds,
        "variants": {
            variant: {
                measure: {**numbers(results.estimate(variant, measure)), "by_seed": _by_seed(by_seed)}
                for measure, by_seed in measures.items()
            }
            for variant, measures in results.values.items()
        },
        "compare": [
            {
                "better": finding.better,
                "than": finding.than,
                "measure": finding.measure,
                **numbers(finding.estimate),
                "by_seed": _by_seed(finding.differences),
                "verdict": finding.verdict,
            }
            for finding in results.findings
        ],
        "run_seconds": {run: _by_seed(by_seed) for run, by_seed in results.seconds.items()},
        "failures": [
            {"run": failure.run, "seed": failure.seed, "message": failure.message} for failure in results.failures
        ],
    }


def _by_seed(numbers: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): number for seed, number in numbers.items()}
