"""The configuration of a stage that makes data."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlsys.plug_in_config import PlugIn, require
from rlsys.stage_config import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """A stage that makes data: answers to problems, graded by `rewards`, filtered.

    They are written to `RUN/STAGE/samples.parquet`; the model stays what it was.
    """

    sampler: PlugIn = field(default_factory=lambda: PlugIn(use="rlsys.samplers:PolicySampler"))
    """Who answers: a class with `start`, `sample` and `close` (`rlsys.samplers:Sampler`)."""
    problems: PlugIn | None = None
    """Source of the problems; without, those of `data.train`."""
    max_problems: int | None = None
    """Only the first so many problems."""
    samples_per_problem: int = 8
    """Answers to each problem."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are sampled."""
    filters: list[PlugIn] = field(default_factory=list)
    """Functions of (samples of one stage, ...) that return those to keep, one after the other, such as
    `rlsys.filters:correct`."""
    problems_per_part: int = 64
    """Problems between two saves: a run that was interrupted goes on behind the last one."""
    max_problems_in_flight: int = 128
    """Problems that are being answered at one time."""

    def __post_init__(self) -> None:
        for name in ("samples_per_problem", "problems_per_part", "max_problems_in_flight"):
            require(getattr(self, name) >= 1, f"samples.STAGE.{name} is {getattr(self, name)}; at least 1 is needed")
        require(
            self.max_problems is None or self.max_problems >= 1,
            f"samples.STAGE.max_problems is {self.max_problems}; at least 1, or null for all",
        )
