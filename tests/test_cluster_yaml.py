"""The cluster file against Ray's own schema and functions, without a cloud; and against what the presets ask for."""

import logging
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rlsys.cluster import shortage
from rlsys.config_file import load_config
from rlsys.fleet import rollout_demand
from rlsys.learner_group import learner_demand

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("still3_zero_32b", "still3_1_5b")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    logging.getLogger("ray").setLevel(logging.ERROR)
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_the_file_is_valid_for_ray(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "learner", "rollout"}, "no node type of Ray's defaults"


def test_ray_refuses_the_file_once_something_is_misspelt(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker_s"):
        validate_config(prepare_config({**cluster, "max_worker_s": 1}))


def test_rollout_nodes_are_spot_instances_that_come_and_go(cluster: dict[str, Any]) -> None:
    rollout = cluster["available_node_types"]["rollout"]
    assert rollout["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert rollout["min_workers"] == 0 < rollout["max_workers"] <= cluster["max_workers"]
    assert cluster["idle_timeout_minutes"] > 0
    for name in ("head", "learner"):
        assert "InstanceMarketOptions" not in cluster["available_node_types"][name]["node_config"]


def test_all_workers_may_run_at_once(cluster: dict[str, Any]) -> None:
    workers = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert cluster["max_workers"] == sum(kind["max_workers"] for kind in workers)


def test_no_actor_is_placed_on_the_head(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cluster_can_grow_to_what_a_preset_asks_for(cluster: dict[str, Any], preset: str) -> None:
    config = load_config(ROOT / "configs" / f"{preset}.yaml")
    kinds = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    nodes = [kind["resources"] for kind in kinds for _ in range(kind["max_workers"])]
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0) + amount
    assert shortage([rollout_demand(config), learner_demand(config)], total, nodes) is None


@pytest.mark.parametrize("preset", PRESETS)
def test_enough_nodes_hold_whole_rollout_actors(cluster: dict[str, Any], preset: str) -> None:
    demand = rollout_demand(load_config(ROOT / "configs" / f"{preset}.yaml"))
    rollout = cluster["available_node_types"]["rollout"]
    actors_on_one_node = min(int(rollout["resources"][name] // amount) for name, amount in demand.each.items())
    assert rollout["max_workers"] * actors_on_one_node >= demand.count


def test_every_start_command_has_token_authentication_on(cluster: dict[str, Any]) -> None:
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert len(commands) == 4
    assert all(command.startswith("export RAY_AUTH_MODE=token;") for command in commands)
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()


def test_the_job_server_does_not_listen_to_the_network(cluster: dict[str, Any]) -> None:
    start = cluster["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start


def test_set_up_installs_the_dependencies_of_the_project_and_not_the_project(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    installed = [word for command in installs for word in shlex.split(command)[5:]]
    assert sorted(installed) == sorted(project["dependencies"] + project["optional-dependencies"]["gpu"])
    assert not any("rlsys" in word for word in installed)
