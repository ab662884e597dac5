"""The stages of a run, each in a room of its own: what is started, what one step is, what is left behind.

A stage takes a model folder and leaves one. It is resumable inside (from its newest valid checkpoint) and as a whole
(a finished stage is not run again).
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

from rlsys.config import Config
from rlsys.stages.common import Interrupted, Run
from rlsys.stages.evaluation import evaluation
from rlsys.stages.preference import preference, reward_model
from rlsys.stages.rl import rl
from rlsys.stages.sampling import sampling
from rlsys.stages.sft import sft
from rlsys.stages.tpo import tpo

STAGES = {"sft": sft, "preference": preference, "reward_model": reward_model, "tpo": tpo, "rl": rl, "eval": evaluation}


def stage_of(config: Config, name: str) -> Callable[[Run, Path], Awaitable[Path]]:
    """The stage that `stages` names, from a model folder to one."""
    return sampling(name) if name in config.samples else STAGES[name]


__all__ = ["STAGES", "Interrupted", "Run", "stage_of"]
