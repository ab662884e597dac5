"""A chain of stages whose driver is killed anywhere: what is finished stays, what is not is done, nothing twice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rlsys.run
from rlsys.config import Config
from rlsys.config_file import load_config
from rlsys.errors import CheckpointError
from rlsys.records import RunDirectory
from rlsys.stages import Run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "chain.yaml"
STAGES = ["sft", "long", "short", "preference", "rl", "eval"]
KEEP_THE_MODEL = ("long", "short", "eval")


class Killed(BaseException):
    """In the place of a driver that is killed: nobody tries again."""


class Chain:
    """A run of `configs/chain.yaml` whose stages only write down that they were there."""

    def __init__(self, folder: Path) -> None:
        self.config: Config = load_config(CONFIG, [f"run_dir={folder / 'run'}", "trackers=[]"])
        self.folder = folder / "run"
        self.ended: list[tuple[str, str]] = []
        """Stages that came to their end, with the folder of the model that they were given."""
        self.begun: Counter[str] = Counter()
        self.kill_in = self.kill_before_finish = self.kill_behind = ""

    def stage_of(self, _config: Config, name: str) -> Callable[[Run, Path], Awaitable[Path]]:
        async def stage(run: Run, model: Path) -> Path:
            self.begun[name] += 1
            if name == self.kill_in:
                raise Killed(name)
            self.ended.append((name, model.parent.name))
            if name in KEEP_THE_MODEL:
                return model
            left = run.directory.stage(name) / "model"
            left.mkdir(parents=True, exist_ok=True)
            return left

        return stage

    def finish(self, directory: RunDirectory, stage: str, model: Path) -> None:
        if stage == self.kill_before_finish:
            raise Killed(stage)
        RunDirectory.finish(directory, stage, model)
        if stage == self.kill_behind:
            raise Killed(stage)

    def train(self, *, resume: bool) -> dict[str, Any]:
        return rlsys.run.train(self.config, resume=resume, session=NoRay())

    @property
    def finished(self) -> list[str]:
        return [name for name in STAGES if (self.folder / name / "done.json").exists()]


class NoRay(rlsys.run.Session):
    """A session without a cluster."""

    def connect(self, _config: Any) -> None:
        return None


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    found = Chain(tmp_path)

    async def there(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(rlsys.run, "stage_of", found.stage_of)
    monkeypatch.setattr(rlsys.run, "plot_curves", lambda _: None)
    monkeypatch.setattr(rlsys.run, "_starting_model", lambda _config, folder: folder / "scratch")
    monkeypatch.setattr("rlsys.run.cluster.require", there)
    directory = type("Directory", (RunDirectory,), {"finish": lambda *given: found.finish(*given)})
    monkeypatch.setattr(rlsys.run, "RunDirectory", directory)
    return found


def test_a_chain_hands_each_model_to_the_stage_behind_it(chain: Chain) -> None:
    assert chain.config.stages == STAGES
    chain.train(resume=False)
    given = ["run", "sft", "sft", "sft", "preference", "rl"]  # data is made by a model and leaves it as it is
    assert chain.ended == list(zip(STAGES, given, strict=True))
    assert (chain.folder / "model").resolve() == (chain.folder / "rl" / "model").resolve()
    with pytest.raises(CheckpointError, match="is finished"):
        chain.train(resume=True)


@pytest.mark.parametrize("killed", STAGES)
@pytest.mark.parametrize("place", ["kill_in", "kill_before_finish", "kill_behind"])
def test_a_chain_that_is_killed_anywhere_ends_like_one_that_was_not(chain: Chain, killed: str, place: str) -> None:
    setattr(chain, place, killed)
    with pytest.raises(Killed):
        chain.train(resume=False)
    before = STAGES[: STAGES.index(killed)]
    before += [killed] * (place == "kill_behind")
    assert chain.finished == before
    setattr(chain, place, "")
    if before == STAGES:
        with pytest.raises(CheckpointError, match="is finished"):
            chain.train(resume=True)
    else:
        chain.train(resume=True)
    assert chain.finished == STAGES
    again = place != "kill_behind"
    assert chain.begun == Counter({name: 1 + (again and name == killed) for name in STAGES})
    given = dict(zip(STAGES, ["run", "sft", "sft", "sft", "preference", "rl"], strict=True))
    assert all(model == given[name] for name, model in chain.ended)
    assert json.loads((chain.folder / "eval" / "done.json").read_text())["model"].endswith("run/rl/model")


def test_a_stage_whose_folder_is_deleted_is_done_again_and_so_are_those_behind_it(chain: Chain) -> None:
    chain.train(resume=False)
    for name in STAGES[STAGES.index("preference") :]:
        shutil.rmtree(chain.folder / name)
    chain.train(resume=True)
    assert [name for name, _ in chain.ended] == [*STAGES, "preference", "rl", "eval"]
    assert chain.finished == STAGES


def test_a_stage_that_is_put_behind_a_finished_chain_is_run(chain: Chain) -> None:
    whole = chain.config
    chain.config = replace(whole, stages=STAGES[:-2])
    chain.train(resume=False)
    chain.config = whole
    chain.train(resume=True)
    assert [name for name, _ in chain.ended] == STAGES
