"""One driver for each run directory: a lock that says who holds it, and that also holds on folders hosts share.

`RUN/driver.json` names the process and is written anew every two seconds. On the driver's host the process is looked
for; from another host the beats are counted, since clocks differ and locks of the system do not reach everywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rlsys.errors import ConfigError

log = logging.getLogger(__name__)

LOCK = "driver.json"
BEAT_SECONDS = 2.0
SILENT_SECONDS = 20.0
"""A driver on another host whose beats were not counted up for so long is dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """A process that runs the loop of a run, as its lock names it."""

    pid: int
    host: str
    machine: str
    """Where `pid` means something: the boot of a host and the processes that it shows."""
    born: str
    """When the process began, by the clock of its kernel: another one may get its number later."""
    started: float
    """Seconds since the epoch."""
    heartbeat: float
    """Of the last beat, seconds since the epoch, by the clock of its host."""
    beats: int = 0
    job: str = ""
    """The Ray job around it, if any."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def this_process(cls, *, job: str = "") -> Driver:
        """The process that asks."""
        pid, now = os.getpid(), time.time()
        return cls(
            pid=pid,
            host=socket.gethostname(),
            machine=_machine(),
            born=_born(pid),
            started=now,
            heartbeat=now,
            job=job,
        )

    @classmethod
    def of(cls, folder: Path) -> Driver | None:
        """Whoever the lock of a run directory names, dead or alive; None where there is no lock.

        Raises:
            ConfigError: it is no lock that was written here.
        """
        path = folder / LOCK
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} names no driver ({error}); remove it if none is alive") from error

    @property
    def is_here(self) -> bool:
        """Whether it ran where this process runs, so that its number tells whether it is alive."""
        return self.machine == _machine()

    @property
    def silent_seconds(self) -> float:
        """Since its last beat, as far as the clocks of two hosts agree."""
        return max(0.0, time.time() - self.heartbeat)

    @property
    def alive(self) -> bool:
        """Whether the process lives; from another host a guess, by its last beat and clocks that may differ."""
        if self.is_here:
            return _born(self.pid) == self.born != ""
        return self.silent_seconds < 3 * SILENT_SECONDS

    @property
    def how_to_stop(self) -> str:
        """What ends it, for a person."""
        return f"`ray job stop {self.job}`" if self.job else f"`kill {self.pid}` on {self.host}"

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host} since {began}"


class DriverLock:
    """The lock of a run directory, held by this process until `release`."""

    def __init__(self, folder: Path, driver: Driver, lost: Callable[[Driver], None]) -> None:
        self.folder, self.driver = folder, driver
        self._lost = lost
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="driver lock", daemon=True)
        self._beating.start()

    @classmethod
    def take(
        cls,
        folder: Path,
        *,
        job: str = "",
        tell: Callable[[str], None],
        lost: Callable[[Driver], None] | None = None,
    ) -> DriverLock:
        """Make this process the driver of a run directory, which is made where there is none.

        The lock of a dead driver is taken over, and `tell` hears of it. Should another process ever take this one over,
        as from a driver that was frozen for long, `lost` is called with it; by default this process ends at once,
        because two that write spoil the run.

        Raises:
            ConfigError: another driver is alive; names it, and how to stop it.
        """
        mine = Driver.this_process(job=job)
        folder.mkdir(parents=True, exist_ok=True)
        if not _write_first(folder, mine):
            before = Driver.of(folder)
            if before is not None:
                if _lives(folder, before):
                    raise _taken(folder, before)
                tell(f"{folder}: its driver, {before}, is dead; this process takes over")
            _write(folder, mine)
            time.sleep(BEAT_SECONDS / 4)  # of several that take over, the last one has it
            now = Driver.of(folder)
            if now is not None and now.token != mine.token:
                raise _taken(folder, now)
        return cls(folder, mine, lost or _end_at_once)

    def release(self) -> None:
        """Give it back; a directory in which nothing was written meanwhile goes too."""
        self._released.set()
        self._beating.join()
        now = Driver.of(self.folder)
        if now is not None and now.token == self.driver.token:
            (self.folder / LOCK).unlink(missing_ok=True)
        (self.folder / f"{LOCK}.{self.driver.token}").unlink(missing_ok=True)  # of a beat that failed
        with contextlib.suppress(OSError):  # it is not empty, as a rule
            self.folder.rmdir()

    def __enter__(self) -> DriverLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        beats = 0
        while not self._released.wait(BEAT_SECONDS):
            beats += 1
            try:
                now = Driver.of(self.folder)
                if now is not None and now.token != self.driver.token:
                    self._lost(now)
                    return
                _write(self.folder, replace(self.driver, beats=beats, heartbeat=time.time()))
            except (OSError, ConfigError) as error:  # a full disk, or a directory that is being moved aside
                log.warning("the driver's lock could not be written: %s", error)


def _taken(folder: Path, driver: Driver) -> ConfigError:
    return ConfigError(
        f"{folder} has a driver already: {driver}, last heard of {driver.silent_seconds:.0f} s ago. Stop it with "
        f"{driver.how_to_stop} (it saves and ends), watch it with `rlsys status {folder}`, or set run_dir"
    )


def _lives(folder: Path, driver: Driver) -> bool:
    """Whether this driver is alive: where it runs elsewhere, whether its beats are counted up."""
    if driver.is_here:
        return driver.alive
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        now = Driver.of(folder)
        if now is None:
            return False
        if (now.token, now.beats) != (driver.token, driver.beats):
            return True
    return False


def _write_first(folder: Path, driver: Driver) -> bool:
    """Write the lock where there is none; of several processes on any hosts one succeeds."""
    partial = _partial(folder, driver)
    try:
        os.link(partial, folder / LOCK)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def _write(folder: Path, driver: Driver) -> None:
    os.replace(_partial(folder, driver), folder / LOCK)


def _partial(folder: Path, driver: Driver) -> Path:
    path = folder / f"{LOCK}.{driver.token}"
    path.write_text(json.dumps(asdict(driver)))
    return path


def _machine() -> str:
    """This boot of this host, and the processes that it shows to this one; the host's name where Linux does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str:
    """The tick in which a process began; without /proc just that it is there; empty where there is no such process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "alive" if not Path("/proc").exists() and _answers(pid) else ""
    state, tick = after_name[0], after_name[19]
    return "" if state in "ZX" else tick


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _end_at_once(other: Driver) -> None:
    print(f"error: {other} has taken over this run, so this driver ends", file=sys.stderr, flush=True)
    os._exit(1)
