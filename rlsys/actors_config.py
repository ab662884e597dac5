"""The configuration of the rollout workers: how many there are, what they host, and when one is given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlsys.plug_in_config import require


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    """Rollout actors: each hosts one vLLM engine and carries many rollouts at once."""

    count: int = 2
    """How many rollout actors a run begins with; `rlsys scale` changes it while the run goes on."""
    min: int = 1
    """Never fewer."""
    max: int | None = None
    """Never more. With it their number follows the work that waits, between `min` and `max`."""
    cpus: float = 1.0
    """CPUs that Ray reserves for each."""
    gpus: float = 0.0
    """GPUs for each (the engine's tensor-parallel size)."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources for each, such as `{rollout: 1}`, to place them on nodes of their own."""
    use: str = "rlsys.actors.rollout:RolloutActor"
    """The actor class."""
    engine: str = "rlsys.actors.engine:VllmEngine"
    """The class of the engine in it."""
    max_rollouts: int = 64
    """Rollouts that one engine generates at once (vLLM's `max_num_seqs`); one actor is given twice as many."""
    siblings: Literal["together", "spread"] = "together"
    """Where the rollouts of one problem are written: `together` in one engine, which reads their prompt once; `spread`
    over all workers, each of which reads it, so that few long ones hold up less."""
    max_model_tokens: int = 512
    """The context: prompt, generated text and tool output together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The engine's number format."""
    kv_cache_gib: int = 1
    """Memory for keys and values in a CPU engine, GiB."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Anything else for vLLM's `AsyncEngineArgs`."""
    start_seconds: float = 600.0
    """Deadline for an engine to load and answer."""
    sync_seconds: float = 300.0
    """Deadline for one weight update, measured outside the collective."""
    attempts: int = 3
    """How often a problem is given to a worker that then dies or fails, before it is set aside as quarantined."""
    watch_seconds: float = 5.0
    """Pause between looks at a worker."""
    answer_seconds: float = 30.0
    """A worker that leaves a look unanswered for so long is killed and replaced."""
    stall_seconds: float = 300.0
    """An engine that has work and writes no token for so long is killed and replaced, however well it answers."""
    drain_seconds: float = 600.0
    """So long a worker that is to leave may finish what it has; then its problems begin again elsewhere."""
    wait_seconds: float = 600.0
    """So long a run waits where no worker serves, before it ends with a checkpoint and an error."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"actors.count is {self.count}; at least one rollout actor is needed")
        require(self.min >= 1, f"actors.min is {self.min}; a run keeps at least one rollout actor")
        require(self.count >= self.min, f"actors.count ({self.count}) is below actors.min ({self.min})")
        require(
            self.max is None or self.count <= self.max, f"actors.count ({self.count}) is above actors.max ({self.max})"
        )
        require(self.gpus == int(self.gpus), f"actors.gpus is {self.gpus}; an engine takes whole GPUs")
        require(self.attempts >= 1, f"actors.attempts is {self.attempts}; every problem is tried at least once")
        for name in ("watch_seconds", "answer_seconds", "stall_seconds", "wait_seconds"):
            require(getattr(self, name) > 0, f"actors.{name} is {getattr(self, name):g}; it must be above 0")
