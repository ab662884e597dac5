"""`rlsys doctor`: what this machine can do, tried and not guessed, and what would help."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata, util

from rlsys.plugins import resolve

_TIERS = {
    "T2": "allow user namespaces: sysctl user.max_user_namespaces=15000, and on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container a seccomp profile that permits unshare and mount",
    "T1": "a kernel of 5.13 or newer that has Landlock switched on (`lsm=` on its command line)",
    "T0": "a kernel with seccomp filters, on x86_64 or aarch64",
}
_MEANING = {"T2": "namespaces, Landlock, seccomp", "T1": "Landlock, seccomp", "T0": "seccomp, files closed"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` is empty where nothing needs to be done."""

    what: str
    here: str
    ok: bool
    advice: str = ""


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown. Takes some seconds."""
    return [_python(), _cores(), *(_package(name) for name in ("torch", "vllm", "ray")), _gpus(), *_isolation()]


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Finding("Python", platform.python_version(), ok, "" if ok else "use Python 3.11, 3.12 or 3.13")


def _cores() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    ok = gib >= 8
    here = f"{len(os.sched_getaffinity(0))} cores, {gib:.1f} GiB of memory"
    return Finding("machine", here, ok, "" if ok else "the quickstart needs about 8 GiB")


def _package(name: str) -> Finding:
    if util.find_spec(name) is None:
        return Finding(name, "not installed", False, 'pip install "rlsys[cpu]" or "rlsys[gpu]"')
    versions = [metadata.version(found) for found in (name, f"{name}-cpu") if _installed(found)]
    return Finding(name, versions[0] if versions else "installed", True)


def _installed(distribution: str) -> bool:
    return any(True for _ in metadata.distributions(name=distribution))


def _gpus() -> Finding:
    if util.find_spec("torch") is None:
        return Finding("GPUs", "unknown without torch", False)
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    return Finding("GPUs", f"{count} ({', '.join(names)})" if count else "none: runs on the CPU", True)


def _isolation() -> list[Finding]:
    """Every tier of the Python tool, tried with its canaries."""
    found: list[Finding] = []
    for tier, advice in _TIERS.items():
        try:
            asyncio.run(_try_tier(tier))
        except RuntimeError as error:
            reason = str(error).partition("(")[2].partition("). ")[0] or str(error)
            better = any(finding.ok for finding in found)
            found.append(Finding(f"Python tool, {tier}", f"not here: {reason}", better, "" if better else advice))
        else:
            found.append(Finding(f"Python tool, {tier}", f"works ({_MEANING[tier]})", True))
    return found


async def _try_tier(tier: str) -> None:
    tool = resolve("rlsys.tools.python:PythonTool", place="doctor")(tier=tier)
    try:
        await tool.start()
    finally:
        await tool.close()
