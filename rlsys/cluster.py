"""The one door to Ray: connect, check that what is asked is there, place actors, call them with a deadline."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayError, RayTaskError

from rlsys.config import ClusterConfig
from rlsys.errors import ActorDiedError, ActorError, ActorTimeoutError, ResourceError, RlsysError
from rlsys.gauges import Metric, Reading

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


def connect(config: ClusterConfig) -> None:
    """Join the cluster at `config.address` (or RAY_ADDRESS), else start one on this machine."""
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    # Ray warns on stderr about things that no user of ours can act on.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # At Ray's 15 another busy program leaves actors on this machine so little that they miss their deadlines.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray refuses a variable that the job's own runtime environment sets too; what the job says goes.
    set_by_job = _job_environment()
    env_vars = {name: value for name, value in _CPU_ENVIRONMENT.items() if name not in set_by_job}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": env_vars},
            **local,
        )
    except Exception as error:  # Ray raises bare exceptions here
        hint = "" if "RAY_AUTH_MODE" in os.environ else " (does it ask for a token? then set RAY_AUTH_MODE=token)"
        raise ResourceError(f"cannot reach a Ray cluster at {address!r}{hint}: {error}") from error


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends with all its processes."""
    ray.shutdown()


def shortage(demands: Sequence[Demand], total: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """What `total` (summed over `nodes`) lacks for `demands`, in words; None where everything fits.

    An actor never spans nodes, so one whole actor must also fit on some node.
    """
    asked: dict[str, float] = {}
    for demand in demands:
        for name, amount in demand.each.items():
            asked[name] = asked.get(name, 0.0) + demand.count * amount
        if not any(all(node.get(name, 0) >= amount for name, amount in demand.each.items()) for node in nodes):
            return f"no node has {words(demand.each)} for one of the {demand.what}"
    lacking = {name: amount for name, amount in asked.items() if total.get(name, 0.0) + 1e-6 < amount}
    if not lacking:
        return None
    parts = "; ".join(f"{demand.count} {demand.what} x ({words(demand.each)})" for demand in demands)
    there = words({name: total.get(name, 0.0) for name in asked})
    return f"the run asks for {words(asked)} [{parts}] but {there} are there"


def words(amounts: Mapping[str, float]) -> str:
    """Resources as a person reads them."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "nothing"


async def require(demands: Sequence[Demand], *, wait_seconds: float) -> None:
    """Return once the cluster has free what `demands` ask for; an autoscaling cluster is asked to grow.

    Raises:
        ResourceError: after `wait_seconds`; says what is asked and what is there.
    """
    missing = await no_room(demands, wait_seconds=wait_seconds)
    if missing is not None:
        raise ResourceError(
            f"{missing}; lower actors.count, learners.count, the count of a reward's or tool's actors or their "
            f"cpus/gpus, or add nodes (waited {wait_seconds:g} s)"
        )


async def no_room(demands: Sequence[Demand], *, beside: Sequence[Demand] = (), wait_seconds: float) -> str | None:
    """What the cluster lacks for `demands` after so many seconds, in words; None as soon as there is room.

    An autoscaling cluster is asked to hold them `beside` what it holds already for this run.
    """
    deadline = time.monotonic() + wait_seconds
    asked_to_grow = False
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        lacking = shortage(demands, ray.cluster_resources(), nodes)
        busy = None if lacking else shortage(demands, ray.available_resources(), nodes)
        if not lacking and not busy:
            return None
        if time.monotonic() > deadline:
            return lacking or f"{busy} (the rest is taken by other work)"
        if not asked_to_grow:
            ask_for([*beside, *demands])
            asked_to_grow = True
        await asyncio.sleep(0.5)


def ask_for(demands: Sequence[Demand]) -> None:
    """Let an autoscaling cluster hold so much, in place of what it was asked for before; another one ignores it."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[demand.each for demand in demands for _ in range(demand.count) if demand.each])


def node_is_leaving() -> bool:
    """Whether Ray was told that this node will be taken away, as a spot instance with notice (`ray drain-node`)."""
    from ray._private.state import state

    return ray.is_initialized() and ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


class Actor:
    """A plain object that Ray placed in a process of its own; every call has a deadline."""

    def __init__(self, name: str, handle: Any, *, call_seconds: float, cancels: bool = False) -> None:
        self.name = name
        self._handle = handle
        self._call_seconds = call_seconds
        self._cancels = cancels

    async def call(self, method: str, *args: Any, seconds: float | None = None, **kwargs: Any) -> Any:
        """Call a method and await its result.

        Raises:
            ActorDiedError: its process has ended.
            ActorTimeoutError: it did not answer within `seconds`.
            ActorError: it raised.
            RlsysError: the method raised one; it arrives as it was.
        """
        limit = self._call_seconds if seconds is None else seconds
        reference = getattr(self._handle, method).remote(*args, **kwargs)
        try:
            async with asyncio.timeout(limit):  # `wait_for` of Python 3.11 may swallow a cancellation
                return await asyncio.wrap_future(reference.future())
        except asyncio.CancelledError:
            if self._cancels and ray.is_initialized():  # else it would start a cluster to cancel in
                ray.cancel(reference)
            raise
        except (TimeoutError, GetTimeoutError) as error:
            raise ActorTimeoutError(f"{self.name}.{method} did not answer within {limit:g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, RlsysError):
                raise error.cause from None
            cause = f"{type(error.cause).__name__}: {error.cause}"
            wrapped = ActorError(f"{self.name}.{method} raised {cause}{_said_before(getattr(error, 'pid', 0))}")
            wrapped.add_note(str(error))
            raise wrapped from error
        except RayActorError as error:
            raise ActorDiedError(f"{self.name} died during {method}: {why_it_died(str(error))}") from error

    def kill(self, *, restart: bool = False) -> None:
        """End the process now; with `restart` Ray replaces it, if it was placed so."""
        ray.kill(self._handle, no_restart=not restart)


def why_it_died(told: str) -> str:
    """What Ray tells of an actor's death, without what only Ray can read; a crash or a kill in plain words."""
    told = " ".join(told.split())
    if crash := re.search(r"pid: (\d+) .*?ip: (\S+) .*Worker exit type: SYSTEM_ERROR", told):
        return (
            f"its process ({crash[1]} on {crash[2]}) ended without a word: it was killed or crashed, or memory ran out "
            "there (then `dmesg` names it)"
        )
    if cause := re.search(r"The actor (?:is dead|died) because (?!of an error)(.*)", told):
        told = cause[1]
    if len(told) > 900:  # a traceback: what and where at its beginning, why at its end
        told = f"{told[:300]} ... {told[-600:]}"
    return told


def _said_before(pid: int) -> str:
    """The first error in the log of a worker on this node: an engine's own process names the cause only there."""
    for path in sorted(Path("/tmp/ray/session_latest/logs").glob(f"worker-*-{pid}.out")):
        errors = re.findall(r"(?m)\b(?!EngineDeadError)(\w+Error: .{1,300})$", path.read_text(errors="replace"))
        if errors:
            return f"; its log begins with {errors[0]!r} ({path})"
    return ""


def place(
    cls: type,
    demand: Demand,
    arguments: Sequence[Mapping[str, Any]],
    *,
    call_seconds: float,
    concurrency: int = 1,
    first_index: int = 0,
    restarts: bool = False,
    cancels: bool = False,
) -> list[Actor]:
    """Start one actor of `cls` for each set of keyword arguments; returns at once, the actors start side by side.

    They are named after the demand and numbered from `first_index`. With `restarts` Ray replaces one that dies: the new
    one is made with the same arguments, on any node, and has no memory of calls before; those under way have failed.
    With `cancels` a call whose caller is cancelled is cancelled in the actor too, whose methods are coroutines.
    """
    remote: Any = ray.remote(cls).options(
        num_cpus=demand.cpus,
        num_gpus=demand.gpus,
        resources=dict(demand.resources) or None,
        max_concurrency=concurrency,
        max_restarts=-1 if restarts else 0,
    )
    return [
        Actor(f"{demand.what} {index}", remote.remote(**keywords), call_seconds=call_seconds, cancels=cancels)
        for index, keywords in enumerate(arguments, first_index)
    ]


def put(value: Any) -> Any:
    """Store a value once in the cluster; passing the returned reference to a call passes the value."""
    return ray.put(value)


# --- Ray jobs --------------------------------------------------------------------------------------------------------

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_NOT_UPLOADED = [".venv", ".git", "runs"]
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def in_job() -> bool:
    """Whether this process is the entrypoint of a Ray job, which runs in a temporary copy of the submitted folder."""
    return _JOB_VARIABLE in os.environ


def _job_environment() -> dict[str, str]:
    """The environment variables that the Ray job around this process was submitted with."""
    job = json.loads(os.environ.get(_JOB_VARIABLE, "{}"))
    return dict((job.get("runtime_env") or {}).get("env_vars") or {})


def job_id() -> str:
    """The id under which the job around this process was submitted; empty outside of one."""
    job = json.loads(os.environ.get(_JOB_VARIABLE, "{}"))
    return str((job.get("metadata") or {}).get("job_submission_id", ""))


def is_local(address: str) -> bool:
    """Whether an address such as `http://127.0.0.1:8265` is on this machine."""
    return (urlsplit(address if "://" in address else f"//{address}").hostname or "") in _LOCAL_HOSTS


def submit_job(arguments: Sequence[str], *, address: str, wait: bool) -> int:
    """Run `python -m rlsys train` with these arguments as a Ray job, the current folder as its working directory.

    `address` is the job server's; RAY_API_SERVER_ADDRESS and RAY_ADDRESS go before it, as in Ray's own command. With
    `wait` the log is printed as it grows and the result is the exit code of the job; else it is 0 once the job is
    accepted.

    Raises:
        ResourceError: there is no job server at `address`, it refuses the token, or the connection was lost.
    """
    from ray.job_submission import JobSubmissionClient

    address = address if "://" in address else f"http://{address}"
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or address
    _require_listener(address)
    for name in ("ray", JobSubmissionClient.__module__):
        logging.getLogger(name).setLevel(logging.ERROR)
    entrypoint = shlex.join(["python", "-m", "rlsys", "train", *arguments])
    if is_local(address):  # a cluster started from an environment that nobody activated has another `python`, or none
        entrypoint = f'PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH" {entrypoint}'
    try:
        client = JobSubmissionClient(address, headers=_local_token(address))
        job = client.submit_job(
            entrypoint=entrypoint,
            runtime_env={"working_dir": ".", "excludes": _NOT_UPLOADED},
        )
    except AuthenticationError as error:
        raise ResourceError(
            f"the job server at {address} wants a token or another one; set RAY_AUTH_MODE=token and put the cluster's "
            "token into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise ResourceError(f"the job server at {address} did not take the job: {error}") from error
    print(f"job {job}; its log: ray job logs --follow {job}; stop it: ray job stop {job}", flush=True)
    if not wait:
        return 0
    try:
        return asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"no longer following; job {job} goes on", flush=True)
        return 130
    except (OSError, RuntimeError) as error:
        raise ResourceError(f"lost the connection to {address}; job {job} may go on: {error}") from error


async def _follow(client: Any, job: str) -> int:
    """Print a job's log until it ends; its exit code (1 where it never got as far as having one)."""
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
    while not (info := client.get_job_info(job)).status.is_terminal():
        await asyncio.sleep(0.5)
    print(f"job {job}: {info.status.value.lower()}", flush=True)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:
        print(info.message, flush=True)
    return info.driver_exit_code or 1


def _require_listener(address: str, *, seconds: float = 5.0) -> None:
    """Find out soon that nothing answers: Ray's client has no deadline of its own."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if port is None:
        return  # a form that Ray itself resolves, such as `auto`
    try:
        socket.create_connection((parts.hostname, port), seconds).close()
    except OSError as error:
        raise ResourceError(
            f"no job server at {address} ({error}); start a cluster with `ray start --head`, give the --address of "
            "one, or forward its port with `ray dashboard cluster.yaml`"
        ) from error


def _local_token(address: str) -> dict[str, str] | None:
    """Ray's token as a header for a job server on this machine.

    `ray start --head` asks for the token wherever a token file exists, but clients send it only where RAY_AUTH_MODE is
    set. To other machines it goes only where the user set that.
    """
    if "RAY_AUTH_MODE" in os.environ or not is_local(address):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    token = os.environ.get("RAY_AUTH_TOKEN") or (path.read_text().strip() if path.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else None


# --- metrics ---------------------------------------------------------------------------------------------------------


class Exporter:
    """Hands readings to the metrics agent of this node, where Prometheus fetches them; all carry `common` as tags.

    Ray forgets a gauge that was not set for some 20 s, so all are to be set again and again, and a worker that is gone
    disappears by itself.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        from ray.util.metrics import Counter, Gauge

        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}
        self._counted: dict[tuple[str, ...], float] = {}
        for metric in metrics:
            group, kind = (self._gauges, Gauge) if metric.kind == "gauge" else (self._counters, Counter)
            group[metric.name] = kind(metric.name, metric.what, tag_keys=("run", "stage", *metric.tags))

    def export(self, readings: Iterable[Reading], common: Mapping[str, str]) -> None:
        """Set gauges, and let counters follow; one that has begun anew counts from there."""
        for reading in readings:
            tags = {**common, **reading.tags}
            if reading.name in self._gauges:
                self._gauges[reading.name].set(reading.value, tags=tags)
                continue
            key = (reading.name, *tags.values())
            before = self._counted.get(key, 0.0)
            more = reading.value - before if reading.value >= before else reading.value
            if more > 0:
                self._counters[reading.name].inc(more, tags=tags)
            self._counted[key] = reading.value
