"""Errors that a user is meant to read: one message that names the value, the place and the fix.

The command line prints these without a traceback. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class RlsysError(Exception):
    """Something that the user can put right."""


class ConfigError(RlsysError):
    """A configuration that cannot mean anything: a misspelt key, a wrong type, two settings that exclude each other."""


class DataError(RlsysError):
    """A data file that is missing, malformed or lacks what the run needs."""


class ResourceError(RlsysError):
    """The cluster does not have what the configuration asks for."""


class CheckpointError(RlsysError):
    """There is nothing valid to resume from, or a checkpoint does not fit the run."""


class ActorError(RlsysError):
    """An actor died, hung past its deadline, or raised; the message names the actor and the cause."""


class ActorTimeoutError(ActorError):
    """An actor did not answer within the deadline; it may be alive."""


class ActorDiedError(ActorError):
    """An actor's process has ended, or its node has."""


class EngineDiedError(ActorError):
    """The engine of a rollout actor has ended while the actor itself lives; it can do nothing without one."""


class FleetLostError(RlsysError):
    """No rollout worker has served for as long as the run was ready to wait."""


class LearnerLostError(RlsysError):
    """A learner rank died or hangs; the others cannot go on without it."""


class ToolError(RlsysError):
    """A tool cannot answer, or not in the state that the policy knows: the rollout is dropped and counted."""


class RewardError(RlsysError):
    """A reward did not grade a rollout: it raised, or gave what is no score; `status` is the word that is counted."""

    status = "error"


class RewardTimeoutError(RewardError):
    """A grading that did not end within its deadline."""

    status = "timeout"


class WeightSyncError(RlsysError):
    """An engine does not hold the weights that the learner sent; the message names the engine and the tensor."""


class TrainingStalledError(RlsysError):
    """Training cannot go on: there is nothing to learn from, no finite gradient, or rewards that do not grade."""


@contextmanager
def failures_of_tool(name: str) -> Iterator[None]:
    """Turn what a tool's own code raises inside into a ToolError; an RlsysError passes as it is."""
    try:
        yield
    except RlsysError:
        raise
    except Exception as error:  # anything may come out of a user's tool
        raise ToolError(f"tool {name!r} raised {type(error).__name__}: {error}") from error
