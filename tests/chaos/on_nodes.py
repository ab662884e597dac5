"""A run on three nodes, as real raylets: one with a rollout worker is killed in the middle, later another one joins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ray.cluster_utils import Cluster

from rlsys.run import train
from rlsys.stages import Interrupted
from tests.chaos.world import configured


def steps_of(folder: Path) -> int:
    """Policy steps that are recorded."""
    path = folder / "run" / "metrics.jsonl"
    return sum(json.loads(line)["stage"] == "rl" for line in path.read_text().splitlines()) if path.exists() else 0


def serving(folder: Path) -> int:
    """Workers that serve, by the run's own status."""
    path = folder / "run" / "status.json"
    workers = json.loads(path.read_text()).get("workers", []) if path.exists() else []
    return sum(worker["state"] == "healthy" for worker in workers)


def disturb(cluster: Cluster, folder: Path, node: object) -> None:
    """Take a node away after three steps, bring another one three steps later, end the run when that one serves."""
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
    os.kill(os.getpid(), signal.SIGINT)


def until(condition: Callable[[], bool], seconds: float = 150.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


def main() -> None:
    """`on_nodes.py FOLDER MODEL`."""
    folder, model = Path(sys.argv[1]), sys.argv[2]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"learner": 1}})
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
        threading.Thread(target=disturb, args=(cluster, folder, nodes[1]), daemon=True).start()
        with contextlib.suppress(Interrupted):
            train(config)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
