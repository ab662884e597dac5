"""The one door to Ray: connect, check that what is asked is there, place actors, call them with a deadline."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlsys.config import ClusterConfig
from rlsys.errors import ActorError, ResourceError, RlsysError

# One thread each: spinning OpenMP threads of neighbours slow one another down 3-10x.
_CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """`count` actors with these resources each."""

    what: str
    count: int
    cpus: float = 0.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def each(self) -> dict[str, float]:
        """Ray's names and amounts for one actor, zeros left out."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount > 0}


def connect(config: ClusterConfig, *, job_env: Mapping[str, str] | None = None) -> None:
    """Join the cluster at `config.address` (or RAY_ADDRESS), else start one on this machine."""
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    # Ray warns on stderr about things that no user of ours can act on.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {**_CPU_ENVIRONMENT, **(job_env or {})}},
            **local,
        )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise ResourceError(f"cannot reach a Ray cluster at {address!r}: {error}") from error


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends with all its processes."""
    ray.shutdown()


def driver_address() -> str:
    """IP address of this node inside the cluster."""
    return str(ray.util.get_node_ip_address())


def shortage(demands: Sequence[Demand], total: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What `total` (summed over `nodes`) lacks for `demands`, in words; None where everything fits.

    An actor never spans nodes, so one whole actor must also fit on some node.
    """
    asked: dict[str, float] = {}
    for demand in demands:
        for name, amount in demand.each.items():
            asked[name] = asked.get(name, 0.0) + demand.count * amount
        if not any(all(node.get(name, 0) >= amount for name, amount in demand.each.items()) for node in nodes):
            return f"no node has {_words(demand.each)} for one of the {demand.what}"
    lacking = {name: amount for name, amount in asked.items() if total.get(name, 0.0) + 1e-6 < amount}
    if not lacking:
        return None
    parts = "; ".join(f"{demand.count} {demand.what} x ({_words(demand.each)})" for demand in demands)
    there = _words({name: total.get(name, 0.0) for name in asked})
    return f"the run asks for {_words(asked)} [{parts}] but {there} are there"


def _words(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "nothing"


async def require(demands: Sequence[Demand], *, wait_seconds: float) -> None:
    """Return once the cluster has free what `demands` ask for; an autoscaling cluster is asked to grow.

    Raises:
        ResourceError: after `wait_seconds`; says what is asked and what is there.
    """
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + wait_seconds
    asked_to_grow = False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        lacking = shortage(demands, ray.cluster_resources(), nodes)
        busy = None if lacking else shortage(demands, ray.available_resources(), nodes)
        if not lacking and not busy:
            return
        if time.monotonic() > deadline:
            state = lacking or f"{busy} (the rest is taken by other work)"
            raise ResourceError(
                f"{state}; lower actors.count, learners.count or their cpus/gpus, or add nodes (waited {wait_seconds:g} s)"
            )
        if not asked_to_grow:
            request_resources(bundles=[demand.each for demand in demands for _ in range(demand.count) if demand.each])
            asked_to_grow = True
        await asyncio.sleep(0.5)


class Actor:
    """A plain object that Ray placed in a process of its own; every call has a deadline."""

    def __init__(self, name: str, handle: Any, *, call_seconds: float) -> None:
        self.name = name
        self._handle = handle
        self._call_seconds = call_seconds

    async def call(self, method: str, *args: Any, seconds: float | None = None, **kwargs: Any) -> Any:
        """Call a method and await its result.

        Raises:
            ActorError: the actor died, raised, or did not answer within `seconds`.
            RlsysError: the method raised one; it arrives as it was.
        """
        limit = self._call_seconds if seconds is None else seconds
        reference = getattr(self._handle, method).remote(*args, **kwargs)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(reference.future()), limit)
        except (TimeoutError, GetTimeoutError) as error:
            raise ActorError(f"{self.name}.{method} did not answer within {limit:g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, RlsysError):
                raise error.cause from None
            wrapped = ActorError(f"{self.name}.{method} raised {type(error.cause).__name__}: {error.cause}")
            wrapped.add_note(str(error))
            raise wrapped from error
        except RayActorError as error:
            reason = " ".join(str(error).split())
            raise ActorError(f"{self.name} died during {method}: {reason[:600]}") from error

    def kill(self) -> None:
        """End the process now."""
        ray.kill(self._handle)


def place(
    cls: type, demand: Demand, arguments: Sequence[Mapping[str, Any]], *, call_seconds: float, concurrency: int = 1
) -> list[Actor]:
    """Start one actor of `cls` for each set of keyword arguments; returns at once, the actors start side by side."""
    remote = ray.remote(cls).options(
        num_cpus=demand.cpus,
        num_gpus=demand.gpus,
        resources=dict(demand.resources) or None,
        max_concurrency=concurrency,
        max_restarts=0,
    )
    return [
        Actor(f"{demand.what} {index}", remote.remote(**keywords), call_seconds=call_seconds)
        for index, keywords in enumerate(arguments)
    ]


def put(value: Any) -> Any:
    """Store a value once in the cluster; passing the returned reference to a call passes the value."""
    return ray.put(value)
