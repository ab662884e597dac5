"""What a sampling stage says about its data: how many, how long, how hard, and what removed the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from rlsys import __version__
from rlsys.config import PlugIn
from rlsys.errors import ConfigError, DataError, RlsysError
from rlsys.plugins import resolve
from rlsys.samples import Sample

_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtered:
    """How many samples one filter was given, and how many it left."""

    filter: str
    given: int
    left: int


def with_pass_rates(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the share of correct ones among the graded answers to the same problem as metric `pass_rate`."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        if sample.correct is not None:
            verdicts[sample.problem.id].append(sample.correct)
    rates = {problem: float(np.mean(found)) for problem, found in verdicts.items()}
    return [
        replace(sample, metrics={**sample.metrics, "pass_rate": rates[sample.problem.id]})
        if sample.problem.id in rates
        else sample
        for sample in samples
    ]


def filtered(
    samples: Sequence[Sample], filters: Sequence[PlugIn], *, place: str
) -> tuple[list[Sample], list[Filtered]]:
    """What all filters leave, one after the other, and what each did. The names of all are in the provenance.

    Raises:
        ConfigError: one is no filter.
        DataError: one raised; names it.
    """
    left, steps = list(samples), []
    for index, plug_in in enumerate(filters):
        where = f"{place}.filters.{index}"
        function = resolve(plug_in.use, place=f"{where}.use")
        given = len(left)
        try:
            left = list(function(left, **plug_in.options))
        except RlsysError as error:
            raise type(error)(f"{where}: {error}") from error
        except Exception as error:  # anything may come out of a user's function
            raise DataError(f"{where}: {plug_in.use!r} raised {type(error).__name__}: {error}") from error
        if not all(isinstance(sample, Sample) for sample in left):
            raise ConfigError(f"{where}: {plug_in.use!r} must return the samples to keep, not {left[:1]!r:.80}")
        steps.append(Filtered(filter=words_of(plug_in), given=given, left=len(left)))
    names = [step.filter for step in steps]
    return [replace(sample, provenance={**sample.provenance, "filters": names}) for sample in left], steps


def words_of(plug_in: PlugIn) -> str:
    """A plug-in as a person names it: `length(at_most=512)`."""
    options = ", ".join(f"{name}={value}" for name, value in plug_in.options.items())
    return plug_in.use.rpartition(":")[2] + (f"({options})" if options else "")


def report_of(
    samples: Sequence[Sample],
    kept: Sequence[Sample],
    steps: Sequence[Filtered],
    *,
    num_problems: int,
    dropped: Mapping[str, int],
    messages: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """The whole report as JSON; `seconds` of sampling, all attempts together."""
    written = sum(sample.num_tokens for sample in samples)
    graded = [sample.correct for sample in samples if sample.correct is not None]
    return {
        "rlsys": __version__,
        "problems": num_problems,
        "problems_answered": len({sample.problem.id for sample in samples}),
        "samples": len(samples),
        "kept": len(kept),
        "acceptance": len(kept) / max(1, len(samples)),
        "dropped": {kind: {"answers": count, "first": messages.get(kind, "")} for kind, count in dropped.items()},
        "filters": [{"filter": s.filter, "given": s.given, "removed": s.given - s.left} for s in steps],
        "correct": float(np.mean(graded)) if graded else None,
        "pass_rates": pass_rates(samples),
        "tokens": {"written": written, "kept": sum(sample.num_tokens for sample in kept)},
        "lengths": {"written": _lengths(samples), "kept": _lengths(kept)},
        "finish_reasons": dict(Counter(str(sample.finish_reason) for sample in samples)),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(written / seconds, 1) if seconds > 0 else None,
    }


def pass_rates(samples: Sequence[Sample]) -> dict[str, int]:
    """Problems by the share of correct answers to them: never, up to a quarter, ..., not quite always, always."""
    rates = {s.problem.id: s.metrics["pass_rate"] for s in samples if "pass_rate" in s.metrics}
    counts = {"0": 0}
    for low, high in pairwise(_RATES):
        counts[f"{low:g}-{high:g}"] = sum(low < rate <= high and rate not in (0, 1) for rate in rates.values())
    counts["0"] = sum(rate == 0 for rate in rates.values())
    counts["1"] = sum(rate == 1 for rate in rates.values())
    return counts


def _lengths(samples: Sequence[Sample]) -> dict[str, float]:
    """Tokens that the policy wrote."""
    if not samples:
        return {}
    lengths = np.array([sample.num_tokens for sample in samples])
    quantiles = {f"p{share}": float(np.percentile(lengths, share)) for share in (10, 50, 90, 99)}
    return {"mean": float(lengths.mean()), "min": float(lengths.min()), **quantiles, "max": float(lengths.max())}


def nothing_left(steps: Sequence[Filtered], dropped: Mapping[str, int], messages: Mapping[str, str]) -> str:
    """Why a stage has no sample, in words."""
    lost = ", ".join(f"{kind} {count} ({messages.get(kind, '')[:120]})" for kind, count in dropped.items())
    before = f"; not answered or not graded: {lost}" if lost else ""
    if not steps or not steps[0].given:
        return f"there is no answer at all{before}"
    removed = ", ".join(f"{step.filter} removed {step.given - step.left} of {step.given}" for step in steps)
    return f"no sample is left: {removed}{before}"
