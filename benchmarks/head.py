"""The output layer at the size of a real vocabulary: peak memory and time of log-probs, entropies and their gradient.

    python -m benchmarks.head

4096 trained tokens, hidden size 1024, vocabulary 151,936, float32, temperature 0.9, one thread. Every side runs once
forward and backward in a process of its own, after a small run of the same that loads what is loaded late; the order of
the sides turns round after every round.

`naive`: `log_softmax` of all logits, entropies without a gradient. `ours`: `rlsys.learners.model.Policy` on a decoder
that gives fixed hidden states. `trl`: TRL's fused head with log-probs and entropies, as its GRPO trainer calls it, in
TRL's own environment (`python benchmarks/setup_trl.py` makes it).

Memory is the greatest resident size of the process (`ru_maxrss`) less its size when hidden states and weights were
there; the gradients of both (0.64 GB) are in it.

Checked: the weighted sum of log-probs, the mean entropy and the norms of both gradients are the same on all sides.

Not comparable: on GPUs TRL runs kernels of its own, which this says nothing about.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.common import Sample, must
from benchmarks.setup_trl import FOLDER

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).parent.parent
TEMPERATURE = 0.9
PYTHONS = {"naive": sys.executable, "ours": sys.executable, "trl": str(FOLDER / "bin" / "python")}
Head = Callable[["Tensor", "Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
"""From hidden states [N, D], weight [V, D] and labels [N], the first two with gradients, to log-probs and entropies."""


# --- one side, in its own process ------------------------------------------------------------------------------------


def naive() -> Head:
    """What one writes first."""
    import torch

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float() / TEMPERATURE, -1)
        with torch.no_grad():
            entropies = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, labels[:, None])[:, 0], entropies

    return head


def ours() -> Head:
    """The learner's policy, whose decoder is replaced by one that gives these hidden states."""
    from types import SimpleNamespace

    import torch
    from torch import nn

    from rlsys.learners.attention import Layout
    from rlsys.learners.model import Policy

    class Given(nn.Module):
        def __init__(self, hidden: Tensor) -> None:
            super().__init__()
            self.hidden = hidden

        def forward(self, **_: Any) -> tuple[Tensor]:
            return (self.hidden[None],)

    class Network(nn.Module):
        def __init__(self, hidden: Tensor, weight: Tensor) -> None:
            super().__init__()
            self.model = Given(hidden)
            self.lm_head = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            self.lm_head.weight = weight
            self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(weight)))

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.arange(len(labels))
        layout = Layout([0, len(labels)], [-1])
        # The token before is a source: label i belongs to the hidden state i.
        return Policy(Network(hidden, weight))(labels, every, layout, every, every, TEMPERATURE)

    return head


def trl() -> Head:
    """TRL's function behind `add_fused_lm_head`, with the chunk size that it has there."""
    from trl.trainer import utils

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        function, chunk = utils._ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE
        found = function.apply(hidden, weight, None, labels, TEMPERATURE, chunk, None, 1.0, ("log_probs", "entropy"))
        return found[0], found[1].detach()

    return head


def run(head: Head, *, tokens: int, width: int, vocabulary: int) -> Sample:
    """Forward and backward once."""
    import torch

    torch.manual_seed(0)
    hidden = torch.nn.Parameter(torch.randn(tokens, width))
    weight = torch.nn.Parameter(torch.randn(vocabulary, width).mul_(2 / width**0.5))
    labels, weights = torch.randint(0, vocabulary, (tokens,)), torch.randn(tokens)
    before = resident()
    # A peak of the preparation would hide a lower one of the run.
    must(peak() - before < 64 * 2**20, f"the inputs took {peak() - before} bytes more than they leave")
    started = time.perf_counter()
    logprobs, entropies = head(hidden, weight, labels)
    loss = (logprobs * weights).sum() / tokens
    forward = time.perf_counter() - started
    loss.backward()
    seconds = time.perf_counter() - started
    bytes_taken = peak() - before
    return {
        "seconds": seconds,
        "forward": forward,
        "peak_gb": bytes_taken / 1e9,
        "loss": float(loss.detach()),
        "entropy": float(entropies.mean()),
        "hidden_norm": float(hidden.grad.norm()),
        "weight_norm": float(weight.grad.norm()),
    }


def peak() -> int:
    """The greatest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Its size now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def child(options: argparse.Namespace) -> None:
    """Run one side, print what it found."""
    common.set_threads()
    import torch

    torch.set_num_threads(1)
    head = {"naive": naive, "ours": ours, "trl": trl}[options.side]()
    run(head, tokens=8, width=16, vocabulary=64)
    found = run(head, tokens=options.tokens, width=options.width, vocabulary=options.vocabulary)
    print(json.dumps(found))


# --- all sides -------------------------------------------------------------------------------------------------------


def measured(side: str, options: argparse.Namespace) -> Callable[[], Any]:
    """One arm: the side in a fresh process."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "width", "vocabulary")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

    async def work() -> Sample:
        command = [PYTHONS[side], "-m", "benchmarks.head", f"--side={side}", *sizes]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        output, errors = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{side} ended with {process.returncode}: {errors.decode()[-3000:]}")
        sample: Sample = json.loads(output.decode().strip().splitlines()[-1])
        return sample

    return work


def check(samples: dict[str, list[Sample]]) -> None:
    """The sides did the same."""
    expected = samples["naive"][0]
    for side, rounds in samples.items():
        for sample in rounds:
            for name in ("loss", "entropy", "hidden_norm", "weight_norm"):
                close = abs(sample[name] - expected[name]) <= 1e-4 * abs(expected[name])
                must(close, f"{name} of {side} is {sample[name]}, of naive {expected[name]}")


async def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, check, print, write."""
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=4096, help="trained tokens (naive takes 1.8 MB for each)")
    parser.add_argument("--width", type=int, default=1024, help="hidden size")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="tokens that the vocabulary has")
    parser.add_argument("--side", choices=PYTHONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        return child(options)
    if not Path(PYTHONS["trl"]).exists():
        raise SystemExit("no benchmarks/.venv-trl; make it with `python benchmarks/setup_trl.py`")
    common.set_threads()
    samples = await common.race(
        {side: measured(side, options) for side in PYTHONS}, rounds=options.rounds, settle_seconds=options.settle
    )
    check(samples)
    ratios = {
        "naive / ours, peak": common.ratios(samples["naive"], samples["ours"], "peak_gb"),
        "ours / naive, time": common.ratios(samples["ours"], samples["naive"]),
        "ours / trl, peak": common.ratios(samples["ours"], samples["trl"], "peak_gb"),
        "ours / trl, time": common.ratios(samples["ours"], samples["trl"]),
    }
    for (label, ratio), aim in zip(ratios.items(), ("8x", "at most 1.3x", "at most 1.1x", ""), strict=True):
        common.show(label, ratio, aim)
    common.write("head", options, {"ratios": ratios, "samples": samples})
    return None


if __name__ == "__main__":
    asyncio.run(main())
