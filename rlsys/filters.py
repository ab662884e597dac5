"""Filters of samples: functions of all samples of a stage, and options, that return those to keep."""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.samples import Sample


def correct(samples: Sequence[Sample]) -> list[Sample]:
    """Those that the first reward calls correct."""
    return [sample for sample in samples if sample.correct]
