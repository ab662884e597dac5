"""The stages of a run, each in a room of its own: what is started, what one step is, what is left behind.

A stage takes a model folder and leaves one. It is resumable inside (from its newest valid checkpoint) and as a whole
(a finished stage is not run again).
"""

from rlsys.stages.common import Interrupted, Run
from rlsys.stages.evaluation import evaluation
from rlsys.stages.preference import preference, reward_model
from rlsys.stages.rl import rl
from rlsys.stages.sft import sft

STAGES = {"sft": sft, "preference": preference, "reward_model": reward_model, "rl": rl, "eval": evaluation}

__all__ = ["STAGES", "Interrupted", "Run"]
