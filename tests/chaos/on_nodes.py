"""A run on three nodes, as real raylets, of which one is taken away in the middle: at once, or with notice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from rlsys.run import train
from rlsys.stages import Interrupted
from tests.chaos.world import configured


def steps_of(folder: Path) -> int:
    """Policy steps that are recorded."""
    path = folder / "run" / "metrics.jsonl"
    return sum(json.loads(line)["stage"] == "rl" for line in path.read_text().splitlines()) if path.exists() else 0


def status(folder: Path) -> dict[str, Any]:
    """The run's own."""
    path = folder / "run" / "status.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def serving(folder: Path) -> int:
    """Workers that serve."""
    return sum(worker["state"] == "healthy" for worker in status(folder).get("workers", []))


def disturb(cluster: Cluster, folder: Path, node: object) -> None:
    """Take a node away after three steps, bring another one three steps later, which is to serve."""
    until(lambda: steps_of(folder) >= 3)
    cluster.remove_node(node, allow_graceful=False)
    print("a node is gone", flush=True)
    until(lambda: serving(folder) == 1)
    reached = steps_of(folder)
    until(lambda: steps_of(folder) >= reached + 3)
    print("trained with one worker", flush=True)
    cluster.add_node(num_cpus=1, resources={"rollout": 1})
    until(lambda: serving(folder) == 2)
    reached = steps_of(folder)
    until(lambda: steps_of(folder) > reached)
    print("trained with two workers again", flush=True)


def give_notice(cluster: Cluster, folder: Path, node: object) -> None:
    """Say after three steps that a node will be taken away, take it when its worker has left."""
    until(lambda: steps_of(folder) >= 3)
    cluster.add_node(num_cpus=1, resources={"rollout": 1})
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "notice"]
    place = ["--address", cluster.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "120"]  # type: ignore[attr-defined]
    subprocess.run([Path(sys.executable).parent / "ray", "drain-node", *place, *reason], check=True, timeout=60)
    until(lambda: any(event["what"] == "has left" for event in status(folder)["events"]))
    cluster.remove_node(node, allow_graceful=False)
    until(lambda: serving(folder) == 2)
    reached = steps_of(folder)
    until(lambda: steps_of(folder) > reached)
    print(f"groups that began again: {status(folder)['fleet']['redispatched']}", flush=True)


def until(condition: Callable[[], bool], seconds: float = 150.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def main() -> None:
    """`on_nodes.py FOLDER MODEL (disturb | give_notice)`."""
    folder, model, what = Path(sys.argv[1]), sys.argv[2], {"disturb": disturb, "give_notice": give_notice}[sys.argv[3]]
    # Its hooks for the end of a process need the main thread, and nodes join from another one.
    head = {"num_cpus": 2, "resources": {"learner": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    failures: list[BaseException] = []

    def strike() -> None:
        try:
            what(cluster, folder, nodes[1])
        except BaseException as error:
            failures.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        nodes = [cluster.add_node(num_cpus=1, resources={"rollout": 1}) for _ in range(2)]
        config = configured(
            folder,
            model,
            f"cluster.address={cluster.address}",
            "actors.resources={rollout: 1}",
            "actors.engine_options.tokens_per_second=30",
            "learners.resources={learner: 1}",
            "data.train.options.size=2000",
            "rl.steps=1000",
        )
        threading.Thread(target=strike, daemon=True).start()
        with contextlib.suppress(Interrupted):
            train(config)
    finally:
        cluster.shutdown()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    main()
