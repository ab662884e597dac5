"""What the tests of every backend share: a tiny model, four batches, one rank after another, plain transformers."""

import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlsys.config import LearnersConfig, OptimizerConfig
from rlsys.learners.host import free_port
from rlsys.learners.learner import Learner
from rlsys.losses import clipped_policy_gradient
from rlsys.packing import shard
from rlsys.scratch import ScratchModel, build_scratch_model
from rlsys.types import Rollout, TrainBatch

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]

STEPS, TEMPERATURE = 4, 0.9
OPTIMIZER = OptimizerConfig(
    lr=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1, betas=(0.9, 0.95), max_grad_norm=0.5
)
LOSS = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": 0.1}
WIDE, NARROW = 10_000, 16
"""Token budgets: everything in one micro-batch, and at least four of them for each of two ranks."""


# --- what is learned -------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """A tiny model, larger weights than at birth, and four batches that a slightly different policy sampled."""
    shape = ScratchModel(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        initializer_range=0.02,
        words=[],
    )
    build_scratch_model(folder / "model", shape)
    network = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(folder / "model")
    (folder / "batches.pickle").write_bytes(pickle.dumps([sampled(network, seed) for seed in range(STEPS)]))


def sampled(network: Any, seed: int) -> TrainBatch:
    random = np.random.default_rng(seed)
    rollouts = []
    for length in random.integers(2, 30, 11):
        tokens = random.integers(0, 265, length, dtype=np.int32)
        with torch.no_grad():
            scores = network(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0] / TEMPERATURE
        logprobs = scores[:-1].log_softmax(-1).gather(-1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0]
        mask = random.random(length) < 0.7
        mask[0], mask[-1] = False, True
        noisy = np.concatenate([[0.0], logprobs.numpy() + 0.2 * random.standard_normal(length - 1)])
        versions = np.where(mask, 0, -1).astype(np.int32)
        rollouts.append(
            Rollout(
                tokens=tokens, loss_mask=mask, logprobs=np.where(mask, noisy, 0).astype(np.float32), versions=versions
            )
        )
    return TrainBatch(
        rollouts=tuple(rollouts),
        advantages=tuple(np.full(len(r), random.standard_normal(), dtype=np.float32) for r in rollouts),
        weights=tuple(random.uniform(0.5, 2.0, len(rollouts)).tolist()),
        num_tokens=sum(rollout.num_trained_tokens for rollout in rollouts),
    )


def batches(folder: Path) -> list[TrainBatch]:
    return list(pickle.loads((folder / "batches.pickle").read_bytes()))


def poisoned(batch: TrainBatch) -> TrainBatch:
    """The same with an infinite advantage in one rollout, so in the share of one rank only."""
    first, *rest = batch.advantages
    return replace(batch, advantages=(np.full_like(first, np.inf), *rest))


# --- learners --------------------------------------------------------------------------------------------------------


class Ranks:
    """This process's rank of a learner of one class and its options, one learner after another."""

    def __init__(
        self,
        learner: type[Learner],
        folder: Path,
        *,
        rank: int,
        ports: list[int],
        world_size: int,
        options: Json | None = None,
        name: str = "of",
    ) -> None:
        self.learner, self.folder, self.rank, self.ports = learner, folder, rank, ports
        self.world_size, self.options, self.mine = world_size, options or {}, folder / f"{name}-{world_size}"

    def start(self, *, optimizer: OptimizerConfig = OPTIMIZER, **config: Any) -> Any:
        learner = self.learner(
            model_path=str(self.folder / "model"),
            config=LearnersConfig(options=self.options, **config),
            rank=self.rank,
            world_size=self.world_size,
        )
        learner.start(
            master=("127.0.0.1", self.ports.pop(0)),
            optimizer=optimizer,
            total_steps=STEPS,
            loss=clipped_policy_gradient,
            with_reference=True,
            timeout=120.0,
        )
        return learner

    def step(self, learner: Any, batch: TrainBatch, *, budget: int = WIDE) -> dict[str, float]:
        share = shard(batch, num_ranks=self.world_size, max_tokens=budget)[self.rank]
        metrics = learner.step(share, num_tokens=batch.num_tokens, temperature=TEMPERATURE, **LOSS)
        return {**metrics, "micro_batches": len(share)}


def weights(learner: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in learner._full_weights()}


def wait_for(learner: Any, *, seconds: float = 60) -> None:
    """Return when what `save` began is written."""
    deadline = time.monotonic() + seconds
    while not learner.saved():
        assert time.monotonic() < deadline, "the checkpoint is never written"
        time.sleep(0.01)


def timeless(metrics: Json) -> Json:
    """The metrics of a step that must come out the same when it is done again."""
    return {name: value for name, value in metrics.items() if name not in ("seconds", "max/memory_gib")}


def everything(ranks: Ranks, masters: Callable[[Any], dict[str, Tensor]]) -> Json:
    """All that the tests below look at, on this rank."""
    mine, todo = ranks.mine, batches(ranks.folder)
    result: Json = {}

    learner = ranks.start(dtype="bfloat16")
    result["bfloat16_born"] = masters(learner)
    learner.close()

    learner = ranks.start()
    result["run"] = [ranks.step(learner, batch) for batch in todo[:2]]
    learner.save(str(mine / "checkpoint"))
    result["saved"] = weights(learner)
    result["run"] += [ranks.step(learner, batch) for batch in todo[2:]]  # while the checkpoint may still be written
    result["weights"] = weights(learner)
    wait_for(learner)
    learner.export(str(mine / "export"))
    learner.close()

    learner = ranks.start()
    learner.load(str(mine / "checkpoint"))
    result["loaded"] = weights(learner)
    result["resumed"] = [ranks.step(learner, batch) for batch in todo[2:]]
    result["resumed_weights"] = weights(learner)
    learner.close()

    learner = ranks.start()
    ranks.step(learner, todo[0])
    result["before_reset"] = ranks.step(learner, todo[1])
    learner.reset_reference()
    result["reset"] = ranks.step(learner, todo[2])
    learner.save(str(mine / "reset"))
    result["after_reset"] = ranks.step(learner, todo[3])
    wait_for(learner)
    learner.close()

    learner = ranks.start()
    learner.load(str(mine / "reset"))
    result["after_reset_resumed"] = ranks.step(learner, todo[3])
    learner.close()

    learner = ranks.start()
    result["micro"] = [ranks.step(learner, batch, budget=NARROW) for batch in todo]
    result["micro_weights"] = weights(learner)
    learner.close()

    learner = ranks.start(activation_checkpointing=True)
    result["before_skip"] = weights(learner)
    result["skip"] = [ranks.step(learner, poisoned(todo[0])) for _ in range(2)]
    result["after_skip"] = weights(learner)
    result["after_skip_step"] = ranks.step(learner, todo[2])
    result["after_skip_weights"] = weights(learner)
    learner.close()

    learner = ranks.start(dtype="bfloat16")
    result["bfloat16"] = [ranks.step(learner, batch) for batch in todo[:2]]
    result["bfloat16_published"] = {str(tensor.dtype) for tensor in weights(learner).values()}
    result["bfloat16_masters"] = masters(learner)
    learner.export(str(mine / "bfloat16"))
    learner.reset_reference()
    result["bfloat16_reset"] = ranks.step(learner, todo[2])
    learner.close()
    return result


def plain(folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The same training with transformers alone: a padded batch, the loss written out, AdamW, one process."""
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    frozen = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=OPTIMIZER.betas, weight_decay=0.1, foreach=False)
    metrics = []
    # Warm-up over two steps to 1e-3; then the cosine from 1e-3 at progress 0 to the middle, 0.55e-3, at progress 1/2.
    for batch, lr in zip(batches(folder), [0.5e-3, 1e-3, 1e-3, 0.55e-3], strict=True):
        longest = max(map(len, batch.rollouts))

        def padded(arrays: Any, dtype: torch.dtype, longest: int = longest) -> Tensor:
            return torch.stack(
                [torch.tensor(np.pad(array, (0, longest - len(array))), dtype=dtype) for array in arrays]
            )

        tokens = padded([rollout.tokens for rollout in batch.rollouts], torch.int64)
        attention = padded([np.ones(len(rollout)) for rollout in batch.rollouts], torch.int64)
        mask = padded([rollout.loss_mask for rollout in batch.rollouts], torch.float32)[:, 1:]
        old = padded([rollout.logprobs for rollout in batch.rollouts], torch.float32)[:, 1:]
        advantages = padded(batch.advantages, torch.float32)[:, 1:]

        def logprobs(of: Any, tokens: Tensor = tokens, attention: Tensor = attention) -> Tensor:
            scores = of(input_ids=tokens, attention_mask=attention).logits[:, :-1] / TEMPERATURE
            return scores.log_softmax(-1).gather(-1, tokens[:, 1:, None])[:, :, 0]

        now = logprobs(network)
        with torch.no_grad():
            reference = logprobs(frozen)
        ratio = (now - old).exp()
        bounded = ratio.clamp(0.8, 1.28)
        gain = torch.where(advantages >= 0, torch.min(ratio, bounded), torch.max(ratio, bounded)) * advantages
        kl = (reference - now).exp() - (reference - now) - 1
        loss = ((-gain + 0.1 * kl) * mask * torch.tensor(batch.weights)[:, None]).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in network.parameters()))
        for parameter in network.parameters():
            parameter.grad.mul_(min(1.0, 0.5 / (norm + 1e-6)))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        metrics.append({"loss": float(loss.detach()), "grad_norm": norm, "kl": float((kl * mask).sum().detach())})
    return metrics, {name: parameter.detach() for name, parameter in network.named_parameters()}


# --- several processes, once -----------------------------------------------------------------------------------------


_GIVEN = set[int]()


def free_ports(count: int) -> list[int]:
    """Ports that no other call here was given: all are listened on later, one after another."""
    found: list[int] = []
    while len(found) < count:
        if (port := free_port()) not in _GIVEN:
            _GIVEN.add(port)
            found.append(port)
    return found


def in_two_processes(file: str, folder: Path, *arguments: str, meanwhile: Callable[[], Json]) -> Json:
    """What two processes that run this file as a program found, as `first` and `second`, and what this one did."""
    found, (first, second) = in_processes(file, folder, *arguments, count=2, meanwhile=meanwhile)
    return {**found, "first": first, "second": second}


def in_processes(
    file: str, folder: Path, *arguments: str, count: int, meanwhile: Callable[[], Json]
) -> tuple[Json, list[Json]]:
    """What this process found, and what each of so many did that run this file as a program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
    logs = [folder / f"rank-{rank}.log" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, file, str(folder), str(rank), *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        found = meanwhile()
        deadline = time.monotonic() + 240
        while None in (ends := [process.poll() for process in processes]) and not any(ends):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.05)
        for end, log in zip(ends, logs, strict=True):
            assert not end, log.read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found, [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(count)]


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal but for rounding, which Adam blows up for the few weights whose gradient is near its epsilon."""
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        difference = (tensor - theirs[name]).abs()
        assert float(difference.mean()) < 2e-7, name
        assert float(difference.max()) < 5e-5, f"{name}: a twentieth of one step"


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
