"""The configuration of plug-ins: what may be named, placed in actors of its own, and how a reward counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rlsys.errors import ConfigError

ANSWER_SECONDS = 2.0
"""So long after its deadline a grading is still waited for: the actor itself keeps the time, and its answer travels."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class PlugIn:
    """Any pluggable part."""

    use: str
    """`module:object` of a class or function, the project's or your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for it."""


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Ray actors of a plug-in's own, so that it scales apart from the rollout actors.

    One that dies is replaced. A tool's sessions then go on in another actor by making their calls again, so a call may
    run twice: right for a tool whose effects stay inside its session, as in an interpreter, and wrong for one that
    books flights. A reward grades again in another actor.
    """

    count: int = 1
    """How many actors; a live run may be given more or fewer."""
    cpus: float = 1.0
    """CPUs that Ray reserves for each."""
    gpus: float = 0.0
    """GPUs for each."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources for each, such as `{tools: 1}`, to place them on nodes of their own."""
    max_sessions: int = 64
    """A tool's sessions, or a reward's gradings, in one actor at a time; where all actors are full, a rollout waits for
    a place. What hangs in C code takes along all that its actor carries: 1 keeps a grading that may hang to itself."""
    wait_seconds: float = 300.0
    """Deadline of that wait, and of the wait for an actor that is being replaced; then the tool or reward failed."""
    call_seconds: float = 120.0
    """Deadline of one call; an actor that has not answered by then is given up like a dead one. More than a tool's own
    time limits; a grading has the `timeout_seconds` of its reward instead."""
    watch_seconds: float = 10.0
    """Pause between looks at each actor; one that leaves a look unanswered for `call_seconds` is replaced (a reward's
    not before its `timeout_seconds` have passed)."""
    start_seconds: float = 300.0
    """Deadline for an actor to be placed and its plug-in to start."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"the count of a plug-in's actors is {self.count}; give at least 1, or no `actors`")
        require(self.max_sessions >= 1, f"max_sessions of a plug-in's actors is {self.max_sessions}; at least 1")
        for name in ("wait_seconds", "call_seconds", "watch_seconds", "start_seconds"):
            seconds = getattr(self, name)
            require(seconds > 0, f"{name} of a plug-in's actors is {seconds}; a deadline must be above 0")


@dataclass(frozen=True, kw_only=True)
class PooledPlugIn(PlugIn):
    """A pluggable part that may have actors of its own."""

    actors: PoolConfig | None = None
    """Without this section it runs inside every rollout actor."""

    @property
    def look_seconds(self) -> float:
        """How long one of its actors may leave unanswered whether it is alive."""
        assert self.actors is not None, "without an `actors` section there is no pool"
        return self.actors.call_seconds


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PooledPlugIn):
    """One term of the reward. The reward is the sum of all terms: weight times score, the score within `cap`."""

    name: str = "reward"
    """Under this name the term is logged."""
    weight: float = 1.0
    """Factor of this term in the sum."""
    cap: float | None = None
    """The score counts as at most `cap` and at least `-cap`; what is logged is the score itself."""
    final_weight: float | None = None
    """The weight moves in a straight line from `weight` to this one, which it reaches at `final_step`, and stays."""
    final_step: int = 0
    """The policy step (number of publications) of `final_weight`."""
    timeout_seconds: float = 60.0
    """Deadline of one grading: of one rollout, or of one group by a reward that grades groups."""
    on_failure: Literal["drop", "zero", "fail"] = "drop"
    """What becomes of a rollout that this term cannot grade (it raised, ran out of time, gave no finite number): `drop`
    leaves it out and counts it, `zero` scores it 0 and counts it under its status, `fail` ends the run."""

    @property
    def look_seconds(self) -> float:
        """Later than the deadline of a grading, so that one that hangs its actor has run out of time before."""
        return max(super().look_seconds, self.timeout_seconds + 2 * ANSWER_SECONDS)

    def __post_init__(self) -> None:
        place = f"reward {self.name!r}"
        require(math.isfinite(self.weight), f"{place}: weight is {self.weight}; give a finite number")
        require(
            self.cap is None or (math.isfinite(self.cap) and self.cap > 0),
            f"{place}: cap is {self.cap}; scores are kept between -cap and cap, so give a number above 0, or none",
        )
        require(
            self.final_weight is None or math.isfinite(self.final_weight),
            f"{place}: final_weight is {self.final_weight}; give a finite number",
        )
        require(
            (self.final_weight is None) == (self.final_step == 0) and self.final_step >= 0,
            f"{place}: final_weight is {self.final_weight} and final_step {self.final_step}; give both, the step at "
            "least 1, or leave both out and the weight stays",
        )
        require(
            math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0,
            f"{place}: timeout_seconds is {self.timeout_seconds}; a deadline must be finite and above 0",
        )
