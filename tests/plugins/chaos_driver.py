"""The `rlsys` command as a driver that faults can strike while it saves: `chaos_driver.py FAULTS train CONFIG ...`.

Passes `before_commit`, `in_sync` at every file, `before_rename`, `after_rename` and, when a policy step is recorded,
`after_step`; it goes by the name "driver".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from faults import Injector

from rlsys import checkpoint
from rlsys.cli import main
from rlsys.records import RunDirectory

INJECTOR = Injector(sys.argv.pop(1), "driver")


def passing(work: Callable[..., Any], *, before: str = "", after: str = "") -> Callable[..., Any]:
    """The same work, between two points."""

    def passed(*args: Any, **keywords: Any) -> Any:
        if before:
            INJECTOR.pass_by(before)
        result = work(*args, **keywords)
        if after:
            INJECTOR.pass_by(after)
        return result

    return passed


def rename(source: Any, target: Any) -> None:
    """Only those of checkpoints pass."""
    work = passing(RENAME, before="before_rename", after="after_rename") if "step-" in str(source) else RENAME
    work(source, target)


RENAME = os.rename

if __name__ == "__main__":
    checkpoint.CheckpointStore.commit = passing(checkpoint.CheckpointStore.commit, before="before_commit")  # type: ignore[method-assign]
    checkpoint._sync = passing(checkpoint._sync, after="in_sync")
    os.rename = rename
    RunDirectory.log = passing(RunDirectory.log, after="after_step")  # type: ignore[method-assign]
    main()
