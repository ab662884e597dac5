"""Preference losses and their gradients beside those of TRL's trainers, on the same pairs, policy and reference.

    python -m benchmarks.trl_losses          # after `python benchmarks/setup_trl.py`

About correctness, not speed, so it may run while other things do. An untrained Qwen2-shaped model of 2 layers and a
reference that is this model with noise on its weights, float32; 6 pairs of unequal lengths, random tokens. Ours: pairs
packed into several micro-batches by `shard`, through the learner's policy and `over_pairs` or `over_labelled`; the
baseline of KTO from the mismatched answers of `mismatches`. TRL: `compute_loss` of DPOTrainer (sigmoid, robust, ipo),
CPOTrainer (simpo) and KTOTrainer, on padded batches.

Checked, and it fails where it does not hold: loss to 1e-5 of its size, each parameter's gradient to 1e-4 of its norm,
margin and accuracy of the rewards to 1e-4 where TRL logs the same quantity.

Not comparable, and therefore left out: TRL has no conservative DPO (its `label_smoothing` belongs to `robust`); its
ORPO has a likelihood over prompt and answer as a mean over tokens, ours over answers as a mean over pairs, so of ORPO
the odds ratio term is compared; its logged rewards of IPO are sums where ours are per token, and of ORPO log-probs
where ours are log-odds.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import common
from benchmarks.common import must, say
from benchmarks.trl_step import peer_process
from rlsys import preference
from rlsys.learners.model import Policy, to_tensors
from rlsys.losses import LossInputs, LossOutputs
from rlsys.packing import shard, unpack
from rlsys.pair_tokens import PairRollouts, mismatches
from rlsys.pairs import labelled_batch, over_labelled, over_pairs, pair_batch, with_logprobs
from rlsys.preference import PreferenceInputs, PreferenceOutputs
from rlsys.scratch import byte_tokenizer
from rlsys.types import Rollout, TrainBatch

VOCABULARY = 320
MAX_TOKENS = 90
LENGTHS = ((12, 30, 7), (5, 9, 22), (20, 41, 40), (9, 3, 18), (16, 25, 1), (7, 14, 33))
"""Tokens of prompt, chosen and rejected of each pair."""


@dataclass(frozen=True)
class Case:
    """One loss: how ours is called and TRL's is set."""

    trainer: str
    beta: float
    loss: Any = None
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma: float = 0.0
    logged: tuple[str, ...] = field(default=("margin", "accuracy"))


def odds_ratio_only(inputs: PreferenceInputs) -> PreferenceOutputs:
    """ORPO without the likelihood of the chosen answer."""
    outputs = preference.orpo(inputs)
    return PreferenceOutputs(loss=outputs.loss + inputs.chosen_logprobs / inputs.chosen_lengths, sums=outputs.sums)


CASES = {
    "dpo": Case("dpo", 0.1, preference.dpo),
    "dpo, beta 0.01": Case("dpo", 0.01, preference.dpo),
    "robust dpo": Case("dpo", 0.1, preference.robust_dpo, loss_type="robust", label_smoothing=0.2),
    "ipo": Case("dpo", 0.3, preference.ipo, loss_type="ipo", logged=()),
    "simpo": Case("simpo", 2.0, preference.simpo, gamma=0.7),
    "orpo, odds ratio": Case("orpo", 0.1, odds_ratio_only, logged=()),
    "kto": Case("kto", 0.1, logged=("margin_by_label",)),
}


def pairs() -> list[PairRollouts]:
    """Random tokens, the same every time."""
    generator = np.random.default_rng(7)

    def rollout(prompt: NDArray[np.int64], length: int) -> Rollout:
        tokens = np.concatenate([prompt, generator.integers(3, VOCABULARY, length)]).astype(np.int32)
        return Rollout(
            tokens=tokens,
            loss_mask=np.arange(len(tokens)) >= len(prompt),
            logprobs=np.zeros(len(tokens), np.float32),
            versions=np.full(len(tokens), -1, np.int32),
        )

    found = []
    for prompt_tokens, chosen, rejected in LENGTHS:
        prompt = generator.integers(3, VOCABULARY, prompt_tokens)
        found.append(PairRollouts(rollout(prompt, chosen), rollout(prompt, rejected)))
    return found


def make_models(folder: Path) -> tuple[Path, Path]:
    """The policy, and a reference near it."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.12,  # so that log-probs are not all alike
        tie_word_embeddings=False,
    )
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config)
    for name in ("reference", "policy"):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return folder / "policy", folder / "reference"


def inferred(policy: Policy, rollouts: list[Rollout]) -> list[NDArray[np.float32]]:
    """Log-probs of the trained tokens, one array [T] for each rollout."""
    batch = labelled_batch(rollouts, [True] * len(rollouts))
    (micros,) = shard(batch, num_ranks=1, max_tokens=MAX_TOKENS)
    with torch.no_grad():
        return unpack(
            batch, micros, [policy(*to_tensors(micro, torch.device("cpu")), 1.0)[0].numpy() for micro in micros]
        )


def our_side(policy: Policy, batch: TrainBatch, loss: Any, **options: Any) -> dict[str, float]:
    """What a rank of the learner does before its optimizer; returns the loss and other means over pairs or answers."""
    (micros,) = shard(batch, num_ranks=1, max_tokens=MAX_TOKENS)
    must(len(micros) > 1, "one micro-batch proves nothing about several")
    found: dict[str, float] = {"loss": 0.0}
    for micro in micros:
        logprobs, _ = policy(*to_tensors(micro, torch.device("cpu")), 1.0)
        weights = torch.from_numpy(micro.weights)
        outputs: LossOutputs = loss(
            LossInputs(
                logprobs=logprobs,
                rollout_logprobs=torch.from_numpy(micro.rollout_logprobs),
                advantages=torch.from_numpy(micro.advantages),
                sequences=torch.from_numpy(micro.sequences),
                weights=weights,
                **options,
            )
        )
        total = (outputs.loss * weights).sum() / batch.num_tokens
        total.backward()
        found["loss"] += float(total.detach())
        for name, value in outputs.sums.items():
            found[name] = found.get(name, 0.0) + float(value) / batch.num_tokens
    return found


def with_reference(reference: Policy, rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts with the reference's log-probs."""
    return [with_logprobs(*pair) for pair in zip(rollouts, inferred(reference, rollouts), strict=True)]


def ours(case: Case, policy: Policy, reference: Policy, given: list[PairRollouts]) -> dict[str, float]:
    """Loss, gradients (in the policy) and logged means of one case."""
    flat = with_reference(reference, [rollout for pair in given for rollout in pair[:2]])
    if case.trainer == "kto":
        others = with_reference(reference, mismatches(given, limit=512, place="benchmark"))
        current = inferred(policy, others)
        ratios = [float(now.sum() - other.logprobs.sum()) for now, other in zip(current, others, strict=True)]
        batch = labelled_batch(flat, [True, False] * len(given))
        return our_side(
            policy, batch, partial(over_labelled, beta=case.beta), kl_baseline=max(0.0, float(np.mean(ratios)))
        )
    loss = partial(over_pairs, loss=case.loss, beta=case.beta, label_smoothing=case.label_smoothing, gamma=case.gamma)
    return our_side(policy, pair_batch(list(zip(flat[0::2], flat[1::2], strict=True))), loss)


def rows_of(given: list[PairRollouts]) -> list[dict[str, list[int]]]:
    """The pairs as TRL's collators take them."""
    others = mismatches(given, limit=512, place="benchmark")
    found = []
    for pair, other in zip(given, others, strict=True):
        begin = int(pair.chosen.loss_mask.argmax())
        found.append(
            {
                "prompt_ids": pair.chosen.tokens[:begin].tolist(),
                "chosen_ids": pair.chosen.tokens[begin:].tolist(),
                "rejected_ids": pair.rejected.tokens[begin:].tolist(),
                "mismatched_ids": other.tokens[begin:].tolist(),
            }
        )
    return found


def checked(name: str, case: Case, mine: dict[str, float], theirs: dict[str, Any], policy: Policy, file: Path) -> Any:
    """How far the two sides are apart; fails where that is too far."""
    loss_difference = abs(mine["loss"] - theirs["loss"]) / max(1e-3, abs(theirs["loss"]))
    must(loss_difference <= 1e-5, f"{name}: losses {mine['loss']} and {theirs['loss']}")
    stored = np.load(file)
    gradients = {n.removeprefix("hf."): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    must(set(stored) == set(gradients), f"{name}: other parameters: {set(stored) ^ set(gradients)}")
    worst = 0.0
    for parameter, gradient in gradients.items():
        reference = torch.from_numpy(stored[parameter])
        worst = max(worst, float((gradient - reference).norm() / reference.norm()))
    must(worst <= 1e-4, f"{name}: a gradient differs by {worst} of its norm")
    logged = theirs["logged"]
    compared = {}
    if "margin" in case.logged:
        compared["margin"] = (mine["reward_margin"], logged["rewards/margins"])
        compared["accuracy"] = (mine["accuracy"], logged["rewards/accuracies"])
    if "margin_by_label" in case.logged:
        must(mine["kl"] > 0, f"{name}: the baseline is 0, which compares nothing")
        compared["kl"] = (mine["kl"], logged["kl"])
        margin = (mine["reward_desirable"] - mine["reward_undesirable"]) / mine["desirable"]
        compared["margin"] = (margin, logged["rewards/margins"])
    for what, (one, other) in compared.items():
        must(abs(one - other) <= 1e-4 * max(1.0, abs(other)), f"{name}: {what} {one} and {other}")
    say(f"{name:<18} loss {mine['loss']:.6f}  differs by {loss_difference:.1e}, gradients by {worst:.1e} of their norm")
    return {
        "loss": mine["loss"],
        "trl_loss": theirs["loss"],
        "loss_difference": loss_difference,
        "gradient_difference": worst,
        "logged": {what: {"ours": one, "trl": other} for what, (one, other) in compared.items()},
    }


async def main() -> None:
    """Compare all losses, print, write."""
    options = common.arguments(__doc__, rounds=1).parse_args()
    common.set_threads()
    torch.set_num_threads(1)
    given = pairs()
    results = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        policy_path, reference_path = make_models(folder)
        policy, reference = (Policy.load(str(path)).train() for path in (policy_path, reference_path))
        (folder / "pairs.json").write_text(json.dumps(rows_of(given)))
        with peer_process(folder / "trl.log", "benchmarks.trl_losses_peer") as peer:
            job = {
                "model": policy_path,
                "reference": reference_path,
                "pairs": folder / "pairs.json",
                "folder": folder / "trl",
            }
            ready = peer.ask(**{key: str(path) for key, path in job.items()})
            for case_name, case in CASES.items():
                mine = ours(case, policy, reference, given)
                settings = {
                    key: getattr(case, key) for key in ("trainer", "beta", "loss_type", "label_smoothing", "gamma")
                }
                theirs = peer.ask(**settings, gradients=str(folder / "gradients.npz"))
                results[case_name] = checked(case_name, case, mine, theirs, policy, folder / "gradients.npz")
                policy.zero_grad(set_to_none=True)
    common.write("trl_losses", options, {"cases": results, "peer_versions": ready["versions"]})


if __name__ == "__main__":
    asyncio.run(main())
