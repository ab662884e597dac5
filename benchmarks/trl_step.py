"""One training step of TRL's GRPOTrainer and one of our learner, on the same batch and the same weights.

    python -m benchmarks.trl_step          # after `python benchmarks/setup_trl.py`

4 groups of 8 rollouts, an untrained Qwen2-shaped model of 6 layers with 8,000 tokens, and two kinds of batches: made by
program, with lognormal lengths and prompts of 128 or 512 tokens, and `captured`, one that TRL's trainer has generated,
graded and padded by itself (its prompts have 128 tokens or a few less, its lengths are geometric); float32, one thread
each, one process each. A step is forward, loss and backward: generation and the optimizer are left out on both sides.
The loss is TRL's `dapo` without KL, which is our clipped loss by token: the mean over all completion tokens, clipped at
0.2.

Ours: `shard`, then micro-batches of at most 2,048 tokens through the policy and its loss, the packing counted. TRL:
`GRPOTrainer.training_step` on the batch as TRL pads it (the padding itself is not counted), at the size of micro-batch
that is fastest for it. Both let the C library keep freed memory, which our learner asks for and TRL alone does not, so
TRL is a little faster here than by itself.

Three rows. `raw` is TRL as it runs on a CPU: its head takes a slow path there and also scores prompt and padding, so
this row says little about a GPU. `common head` is TRL's step with the head replaced by ours on the trained tokens only,
the selection that TRL makes on GPUs: what is left is the cost of padding and of repeated prompts, and it is the row to
quote. `padded head` is the same on all padded completion positions.

Checked before any timing: loss to 1e-5 and each parameter's gradient to 1e-4 of its norm, for all three.

Not comparable: the attention of a padded batch computes on CPUs what its mask hides.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Sample, must, say
from benchmarks.learner import MAX_TOKENS, batch, ours, untrained_model
from benchmarks.setup_trl import FOLDER
from rlsys.learners.host import keep_freed_memory
from rlsys.learners.model import Policy, to_tensors
from rlsys.packing import shard, unpack
from rlsys.scratch import byte_tokenizer
from rlsys.stages.common import assemble
from rlsys.types import Rollout, TrainBatch

PROMPTS = (128, 512)
VOCABULARY = 8_000
GROUP_SIZE = 8
HEADS = {"trl": "raw", "common": "common head", "padded": "padded head"}


def padded(data: TrainBatch, prompt_tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """The batch as TRL's trainer gets it from its own generation, completions padded on the right."""
    longest = max(map(len, data.rollouts)) - prompt_tokens
    shape = (len(data.rollouts), longest)
    ids, mask, logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for row, rollout in enumerate(data.rollouts):
        count = len(rollout) - prompt_tokens
        ids[row, :count], mask[row, :count] = rollout.tokens[prompt_tokens:], 1
        logprobs[row, :count] = rollout.logprobs[prompt_tokens:]
    prompts = np.stack([rollout.tokens[:prompt_tokens] for rollout in data.rollouts]).astype(np.int64)
    return {
        "prompt_ids": prompts,
        "prompt_mask": np.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": mask,
        "old_per_token_logps": logprobs,
        "advantages": np.array([advantages[0] for advantages in data.advantages], np.float32),
    }


def captured(file: Path, policy: Policy) -> TrainBatch:
    """TRL's own batch on our token axis, with the policy's log-probs as the recorded ones: TRL takes them so too."""
    arrays = np.load(file)
    rollouts = []
    for row in range(len(arrays["advantages"])):
        prompt, completion = (
            arrays[f"{part}_ids"][row][arrays[f"{part}_mask"][row].astype(bool)] for part in ("prompt", "completion")
        )
        length = len(prompt) + len(completion)
        rollouts.append(
            Rollout(
                tokens=np.concatenate([prompt, completion]).astype(np.int32),
                loss_mask=np.arange(length) >= len(prompt),
                logprobs=np.zeros(length, np.float32),
                versions=np.zeros(length, np.int32),
            )
        )
    data = assemble(rollouts, arrays["advantages"].tolist())
    micro_batches = shard(data, num_ranks=1, max_tokens=MAX_TOKENS)[0]
    with torch.no_grad():
        found = [policy(*to_tensors(micro, torch.device("cpu")), 1.0)[0].numpy() for micro in micro_batches]
    recorded = unpack(data, micro_batches, found)
    return replace(
        data, rollouts=tuple(replace(r, logprobs=values) for r, values in zip(rollouts, recorded, strict=True))
    )


def prompts_of(num_tokens: int) -> list[str]:
    """Four texts of at most so many tokens, which are bytes here, and not all of one length."""
    lines = [f"{number} times {number + 3}, and then {number * 7} more; " for number in range(11, 15)]
    return [(line * 20)[: num_tokens - 5 * index] for index, line in enumerate(lines)]


def make_model(folder: Path) -> Path:
    """The model and a tokenizer, which a trainer wants and which nothing here uses."""
    untrained_model(folder, VOCABULARY)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Peer:
    """A process in TRL's environment, such as that of `trl_step_peer.py`."""

    def __init__(self, process: Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def ask(self, **question: Any) -> Sample:
        """One line there, one line back.

        Raises:
            RuntimeError: it ended; the end of its log is in the message.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"TRL ended: {self._log.read_text()[-3000:]}")
        result: Sample = json.loads(reply)
        return result


@contextmanager
def peer_process(log: Path, module: str = "benchmarks.trl_step_peer") -> Iterator[Peer]:
    """A peer that waits for its job; it ends with the block."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        raise SystemExit("no benchmarks/.venv-trl; make it with `python benchmarks/setup_trl.py`")
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {**os.environ, **quiet}
    command = [str(python), "-m", module]
    root = Path(__file__).parent.parent
    with (
        log.open("w") as errors,
        Popen(command, cwd=root, env=environment, stdin=PIPE, stdout=PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield Peer(process, log)
        finally:
            process.kill()


def our_step(policy: Policy, data: TrainBatch) -> Sample:
    """Packing, forward, loss, backward."""
    started = time.perf_counter()
    micro_batches = shard(data, num_ranks=1, max_tokens=MAX_TOKENS)[0]
    loss = ours(policy, micro_batches, data.num_tokens)
    return {"seconds": time.perf_counter() - started, "loss": loss}


def check(policy: Policy, data: TrainBatch, peer: Peer, file: Path, micro_batches: list[int]) -> dict[str, Any]:
    """Both sides have one loss and one gradient, with each head and each size of micro-batch; how far they differ."""
    loss = our_step(policy, data)["loss"]
    gradients = {name.removeprefix("hf."): tensor.grad for name, tensor in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    found: dict[str, Any] = {"loss": loss}
    for head in HEADS:
        for micro_batch in micro_batches:
            what = f"{HEADS[head]}, micro-batch {micro_batch}"
            theirs = peer.ask(head=head, micro_batch=micro_batch, gradients=str(file))
            stored = np.load(file)
            must(set(stored) == set(gradients), f"{what}: other parameters: {set(stored) ^ set(gradients)}")
            worst = max(_difference(gradients[name], stored[name]) for name in gradients)
            must(abs(theirs["loss"] - loss) <= 1e-5, f"{what}: losses {theirs['loss']} and {loss}")
            must(worst <= 1e-4, f"{what}: a gradient differs by {worst} of its norm")
            found[what] = {"loss": theirs["loss"], "gradient_difference": worst, "seconds": theirs["seconds"]}
    return found


def _difference(one: Any, other: Any) -> float:
    assert one is not None
    reference = torch.from_numpy(other)
    return float((one - reference).norm() / reference.norm())


def fastest(peer: Peer, micro_batches: list[int]) -> dict[str, int]:
    """For each head the size of micro-batch at which TRL is fastest; the check has warmed all of them up."""
    best = {}
    for head, label in HEADS.items():
        seconds = {size: peer.ask(head=head, micro_batch=size)["seconds"] for size in micro_batches}
        best[head] = min(seconds, key=lambda size: seconds[size])
        say(f"  TRL, {label}: " + ", ".join(f"{value:.2f} s at {size}" for size, value in seconds.items()))
    return best


async def case(prompt_tokens: int, folder: Path, options: Any, *, own: bool) -> dict[str, Any]:
    """One batch, made by program or TRL's own: check, tune the peer, race."""
    name = "captured" if own else f"prompt {prompt_tokens}"
    policy = Policy.load(str(make_model(folder / "model"))).train()
    file = folder / "batch.npz"
    if not own:
        data = batch(prompt_tokens, VOCABULARY, own_prompts=False)
        np.savez(file, **padded(data, prompt_tokens))
    with peer_process(folder / "trl.log") as peer:
        job = {"model": str(folder / "model"), "folder": str(folder / "trl"), "batch": str(file)}
        job |= {"rollouts": 4 * GROUP_SIZE, "group_size": GROUP_SIZE}
        ready = peer.ask(**job, prompts=prompts_of(prompt_tokens) if own else [])
        if own:
            data = captured(file, policy)
        checked = check(policy, data, peer, folder / "gradients.npz", options.micro_batches)
        say(f"{name}: loss {checked['loss']:.6f} on both sides, gradients agree")
        best = fastest(peer, options.micro_batches)

        async def our_side() -> Sample:
            sample = our_step(policy, data)
            policy.zero_grad(set_to_none=True)
            return sample

        def side(head: str) -> Any:
            async def run() -> Sample:
                return await asyncio.to_thread(peer.ask, head=head, micro_batch=best[head])

            return run

        samples = await common.race(
            {"ours": our_side, **{head: side(head) for head in HEADS}},
            rounds=options.rounds,
            settle_seconds=options.settle,
            what=f"{name}: ",
        )
    ratios = {label: common.ratios(samples[head], samples["ours"]) for head, label in HEADS.items()}
    for label, ratio in ratios.items():
        common.show(f"{name}: time of a step, TRL with {label} / ours", ratio)
    return {
        "ratios": ratios,
        "samples": samples,
        "micro_batches": best,
        "checked": checked,
        "positions": _positions(data),
        "peer_versions": ready["versions"],
    }


def _positions(data: TrainBatch) -> Mapping[str, int]:
    """What each side computes: why they differ."""
    packed = shard(data, num_ranks=1, max_tokens=MAX_TOKENS)[0]
    prompts = [len(rollout) - rollout.num_trained_tokens for rollout in data.rollouts]
    completions = [rollout.num_trained_tokens for rollout in data.rollouts]
    padded_tokens = len(data.rollouts) * (max(prompts) + max(completions))
    return {"ours": sum(len(micro.tokens) for micro in packed), "padded": padded_tokens, "trained": data.num_tokens}


async def main() -> None:
    """Measure all lengths of prompt, print, write."""
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--prompts", type=int, nargs="*", default=PROMPTS, help="tokens of a prompt")
    parser.add_argument(
        "--micro-batches", type=int, nargs="*", default=[32, 16, 8, 4], help="sizes that TRL is tried at"
    )
    parser.add_argument("--no-captured", action="store_true", help="only batches made by program")
    options = parser.parse_args()
    common.set_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    results = {}
    cases = {f"prompt {count}": (count, False) for count in options.prompts}
    if not options.no_captured:
        cases["captured"] = (PROMPTS[0], True)
    for name, (prompt_tokens, own) in cases.items():
        with TemporaryDirectory() as folder:
            results[name] = await case(prompt_tokens, Path(folder), options, own=own)
    common.write("trl_step", options, {"cases": results})


if __name__ == "__main__":
    asyncio.run(main())
