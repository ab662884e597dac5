"""Submitting a run as a Ray job: what is refused at once, what a job is given, and the real thing on one machine."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlsys import cluster
from rlsys.cli import app
from rlsys.config import ClusterConfig
from rlsys.errors import ConfigError, ResourceError
from rlsys.learners.host import free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-for-this-test-only-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_cluster_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


# --- before anything is sent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_an_address_without_a_job_server_is_a_clear_error_within_seconds(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"no job server at http://127\.0\.0\.1.*ray start --head"):
        cluster.submit_job(["configs/quickstart.yaml"], address=address, wait=True)
    assert time.monotonic() - start < 10


def submitted(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The arguments that `rlsys submit` would hand to the job."""
    calls: list[list[str]] = []

    def submit_job(arguments: list[str], *, address: str, wait: bool) -> int:  # noqa: ARG001
        calls.append(arguments)
        return 7

    monkeypatch.setattr(cluster, "submit_job", submit_job)
    result = CliRunner().invoke(app, ["submit", *arguments])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 7, "the exit code of the job is the command's"
    return calls[0]


def test_results_of_a_job_on_this_machine_land_where_the_user_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    assert submitted(monkeypatch, config, "rl.steps=1")[1:] == ["rl.steps=1", f"run_dir={tmp_path}/runs/quickstart"]
    assert submitted(monkeypatch, config, "run_dir=/shared/run")[1:] == ["run_dir=/shared/run"]


def test_resume_and_fresh_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    assert submitted(monkeypatch, config, "run_dir=/a", "--resume")[1:] == ["run_dir=/a", "--resume"]
    assert submitted(monkeypatch, config, "run_dir=/a", "--fresh")[1:] == ["run_dir=/a", "--fresh"]


def test_a_relative_run_dir_on_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "--address", "http://head:8265"]
    with pytest.raises(ConfigError, match="run_dir=/shared"):
        submitted(monkeypatch, *arguments)
    assert submitted(monkeypatch, *arguments, "run_dir=/shared/run")[-1] == "run_dir=/shared/run"


def test_an_error_in_the_configuration_costs_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="steps"):
        submitted(monkeypatch, str(ROOT / "configs" / "quickstart.yaml"), "rl.stepz=1")


def test_the_token_goes_to_a_job_server_on_this_machine_and_to_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert cluster._local_token("http://127.0.0.1:8265") == {"Authorization": f"Bearer {TOKEN}"}
    assert cluster._local_token("http://head:8265") is None
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster._local_token("http://127.0.0.1:8265") is None, "what the user set goes"


# --- inside a job ----------------------------------------------------------------------------------------------------


def test_inside_a_job_no_variable_is_set_that_the_job_sets_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **options: given.update(options))
    assert not cluster.in_job()
    cluster.connect(ClusterConfig(address="auto"))
    assert given["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
    job = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "4"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert cluster.in_job()
    cluster.connect(ClusterConfig(address="auto"))
    assert "OMP_NUM_THREADS" not in given["runtime_env"]["env_vars"], "Ray refuses a variable that both set"
    assert given["runtime_env"]["env_vars"]["MKL_NUM_THREADS"] == "1"


def test_a_job_without_variables_of_its_own_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": None, "metadata": {}}))
    cluster.connect(ClusterConfig(address="auto"))


# --- a real job server -----------------------------------------------------------------------------------------------


@pytest.fixture
def job_server() -> Iterator[str]:
    """A cluster of its own with token authentication on; it ends with all its processes."""
    folder = tempfile.mkdtemp(prefix="rlsys-ray-", dir="/tmp")  # short: sockets in it have a limited name
    ports = [free_port() for _ in range(6)]
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    names += ("dashboard-agent-grpc-port", "metrics-export-port")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--temp-dir={folder}", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in Path(f"{folder}/log").read_text():
            assert process.poll() is None, Path(f"{folder}/log").read_text()
            assert time.monotonic() < deadline, "the cluster does not come up"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_real_job_runs_the_command_in_this_folder_and_its_exit_code_comes_back(
    job_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ResourceError, match="RAY_AUTH_MODE=token"):
        cluster.submit_job(["--help"], address=job_server, wait=True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert cluster.submit_job(["--help"], address=job_server, wait=True) == 0
    assert "Run the stages of CONFIG" in capsys.readouterr().out
    assert cluster.submit_job(["no such file.yaml"], address=job_server, wait=True) == 1
    assert "no configuration at no such file.yaml" in capsys.readouterr().out
    assert cluster.submit_job(["--help"], address=job_server, wait=False) == 0
