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
    """Problems between two saves: a run that was killed does those again that were answered behind the last one."""
    max_problems_in_flight: int = 128
    """Problems that are being answered at one time; fewer where these are more than twice the answers that all engines
    write at one time."""
    problem_seconds: float = 3600.0
    """Deadline for all answers to one problem; then the attempt failed."""
    retries: int = 2
    """How often a problem is tried again whose answers could not be had at all: an engine failed, say. Then it is left
    out and counted, and tried again by `--resume`."""
    max_failed: float = 0.25
    """The stage stops where more than this share of the answers to the last 64 problems could not be had. Those that
    could not be graded have their own limit, `max_failed_rewards`."""

    def __post_init__(self) -> None:
        for name in ("samples_per_problem", "problems_per_part", "max_problems_in_flight"):
            require(getattr(self, name) >= 1, f"samples.STAGE.{name} is {getattr(self, name)}; at least 1 is needed")
        require(self.retries >= 0, f"samples.STAGE.retries is {self.retries}; 0 tries once")
        require(self.problem_seconds > 0, f"samples.STAGE.problem_seconds is {self.problem_seconds:g}; it is above 0")
        require(
            0 <= self.max_failed <= 1,
            f"samples.STAGE.max_failed is {self.max_failed:g}; a share lies between 0 and 1 (never stop)",
        )
        require(
            self.max_problems is None or self.max_problems >= 1,
            f"samples.STAGE.max_problems is {self.max_problems}; at least 1, or null for all",
        )
