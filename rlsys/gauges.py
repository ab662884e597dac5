"""The numbers of a live run for Prometheus: their names, and how each one is read off its status."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlsys.workers import WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number with a name; besides `tags` all have `run` and `stage`."""

    name: str
    what: str
    tags: tuple[str, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"

    @property
    def exported_as(self) -> str:
        """The name that Prometheus sees: Ray puts its own before it and marks counters."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The value of a metric now; of a counter, so far in this stage."""

    name: str
    value: float
    tags: Mapping[str, str] = field(default_factory=dict)


METRICS = (
    Metric(name="rlsys_step", what="Policy or optimizer steps done"),
    Metric(name="rlsys_steps", what="Policy or optimizer steps that the stage is to do"),
    Metric(name="rlsys_policy_version", what="Version of the weights that workers must hold to serve"),
    Metric(name="rlsys_workers", what="Rollout workers by state", tags=("state",)),
    Metric(name="rlsys_workers_target", what="Rollout workers that there are to be"),
    Metric(name="rlsys_worker_rollouts", what="Rollouts in flight on a worker", tags=("worker",)),
    Metric(name="rlsys_worker_tokens_per_second", what="Tokens that a worker writes", tags=("worker",)),
    Metric(name="rlsys_worker_version", what="Version of the weights that a worker holds", tags=("worker",)),
    Metric(name="rlsys_pool_actors", what="Actors of a reward or tool", tags=("pool",)),
    Metric(name="rlsys_rollouts_waiting", what="Rollouts that no worker has room for"),
    Metric(name="rlsys_groups", what="Groups under way: being generated, or done and untrained", tags=("state",)),
    Metric(name="rlsys_problems", what="What became of problems", tags=("fate",), kind="counter"),
    Metric(name="rlsys_redispatched", what="Groups that were given to another worker", kind="counter"),
    Metric(name="rlsys_staleness_mean", what="Versions between a rollout's first token and its training, mean"),
    Metric(name="rlsys_staleness_max", what="Versions between a rollout's first token and its training, most"),
    Metric(name="rlsys_tokens_per_second", what="Tokens that all workers write"),
    Metric(name="rlsys_trained_tokens_per_second", what="Tokens that were trained, by the seconds of the last step"),
    Metric(name="rlsys_step_seconds", what="Where the time of the last steps went, mean", tags=("part",)),
    Metric(name="rlsys_rollout_seconds", what="Where the time of one rollout went, mean", tags=("part",)),
    Metric(name="rlsys_reward", what="Mean reward of the last step"),
    Metric(name="rlsys_accuracy", what="Share of correct rollouts of the last step"),
)

_SINGLE = {
    "rlsys_step": ("step",),
    "rlsys_steps": ("steps",),
    "rlsys_policy_version": ("version",),
    "rlsys_workers_target": ("fleet", "target"),
    "rlsys_rollouts_waiting": ("fleet", "waiting"),
    "rlsys_redispatched": ("fleet", "redispatched"),
    "rlsys_staleness_mean": ("staleness", "mean"),
    "rlsys_staleness_max": ("staleness", "max"),
    "rlsys_tokens_per_second": ("fleet", "tokens_per_second"),
    "rlsys_trained_tokens_per_second": ("last", "tokens_per_second"),
    "rlsys_reward": ("last", "reward"),
    "rlsys_accuracy": ("last", "accuracy"),
}
"""Where a status has the metrics that are one number."""
_BY_KEY = {
    "rlsys_step_seconds": ("part", ("seconds",)),
    "rlsys_rollout_seconds": ("part", ("rollout_seconds",)),
}
"""The tag and the place of those that are a mapping."""
_FATES = ("trained", "dropped", "discarded", "refused")


def readings(status: Mapping[str, Any]) -> Iterator[Reading]:
    """Every metric that this status has a number for, without `run` and `stage`."""
    for name, value in _found(status):
        yield Reading(name=name, value=value)
    for name, (tag, path) in _BY_KEY.items():
        for key, value in (_at(status, path) or {}).items():
            yield Reading(name=name, value=value, tags={tag: key})
    states = _at(status, ("fleet", "states"))
    for known in WorkerState if states is not None else ():  # all, because Ray repeats a value for a while
        if known is not WorkerState.GONE:
            yield Reading(name="rlsys_workers", value=states.get(known, 0), tags={"state": str(known)})
    for worker in status["workers"]:
        tags = {"worker": worker["name"]}
        yield Reading(name="rlsys_worker_rollouts", value=worker["in_flight"], tags=tags)
        yield Reading(name="rlsys_worker_tokens_per_second", value=worker["tokens_per_second"], tags=tags)
        if worker["version"] is not None:
            yield Reading(name="rlsys_worker_version", value=worker["version"], tags=tags)
    for pool in status["pools"]:
        yield Reading(name="rlsys_pool_actors", value=pool["actors"], tags={"pool": pool["name"]})
    queue = status["queue"]
    for state in ("in_flight", "done"):
        if state in queue:
            yield Reading(name="rlsys_groups", value=queue[state], tags={"state": state})
    for fate in _FATES:
        if fate in queue:
            yield Reading(name="rlsys_problems", value=queue[fate], tags={"fate": fate})


def _found(status: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, path in _SINGLE.items():
        value = _at(status, path)
        if value is not None:
            yield name, value


def _at(status: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = status
    for key in path:
        value = None if value is None else value.get(key)
    return value
