"""The batches of preference learning, with the reference's log-probs, and what is measured on held-out pairs."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rlsys.config import PreferenceConfig
from rlsys.learner_group import LearnerGroup
from rlsys.pair_tokens import PairRollouts, mismatches
from rlsys.pairs import PairLoss, labelled_batch, pair_batch, with_logprobs
from rlsys.preference import PreferenceInputs, dpo, orpo, simpo
from rlsys.stages.offline import StepData, of_step
from rlsys.types import Rollout, TrainBatch

_AT_A_TIME = 256
"""Rollouts whose log-probs are computed in one call."""

_WITHOUT_REFERENCE: tuple[PairLoss, ...] = (simpo, orpo)
_LOOKS, _LOOK_BYTES = 256, 4096
_HELD_OUT = ("accuracy", "reward_chosen", "reward_rejected", "reward_margin")


class Reference:
    """The log-probs of the model that a stage began with, kept in a file with what they belong to."""

    def __init__(self, path: Path, model: Path, tell: Callable[[str], None]) -> None:
        self._path, self._model, self._tell = path, model, tell

    async def given_to(self, rollouts: Sequence[Rollout], learners: LearnerGroup) -> list[Rollout]:
        """The rollouts with these log-probs: from the file where they fit, else of the learner, which holds the model.

        They fit where tokens, masks and model are the same; otherwise they are computed again, and that is said.
        """
        digest = digest_of(rollouts, self._model)
        flat = self._read(digest)
        if flat is None:
            flat = np.concatenate(await logprobs_of(rollouts, learners))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial.npz")
            np.savez(partial, logprobs=flat, digest=np.array(digest))
            partial.replace(self._path)
        cuts = np.cumsum([len(rollout) for rollout in rollouts])[:-1]
        return [with_logprobs(rollout, found) for rollout, found in zip(rollouts, np.split(flat, cuts), strict=True)]

    def _read(self, digest: str) -> NDArray[np.float32] | None:
        if not self._path.exists():
            return None
        try:
            with np.load(self._path) as stored:
                if str(stored["digest"]) == digest:
                    flat: NDArray[np.float32] = stored["logprobs"]
                    return flat
            why = "belongs to other pairs or another model"
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            why = f"cannot be read ({type(error).__name__}: {error})"
        self._tell(f"{self._path} {why}: the reference's log-probs are computed again")
        return None


def digest_of(rollouts: Sequence[Rollout], model: Path) -> str:
    """One word for these tokens, masks and model: another one where any of them changed."""
    found = hashlib.sha256(_identity(model).encode())
    for rollout in rollouts:
        for array in (rollout.tokens, rollout.loss_mask):
            found.update(len(array).to_bytes(8, "little"))
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _identity(model: Path) -> str:
    """One word for a model folder: its configuration, and bytes from many places of its weights; or a hub's name.

    Not all bytes, of which there may be many gigabytes: training moves weights everywhere.
    """
    if not model.is_dir():
        return str(model)
    found = hashlib.sha256()
    files = [path for pattern in ("config.json", "*.safetensors", "*.bin") for path in sorted(model.glob(pattern))]
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in np.linspace(0, max(0, size - _LOOK_BYTES), _LOOKS).astype(int).tolist():
                file.seek(place)
                found.update(file.read(_LOOK_BYTES))
    return found.hexdigest()


async def logprobs_of(rollouts: Sequence[Rollout], learners: LearnerGroup) -> list[NDArray[np.float32]]:
    """What the policy says of the trained tokens, one array [T] for each rollout, 0 elsewhere."""
    found: list[NDArray[np.float32]] = []
    for first in range(0, len(rollouts), _AT_A_TIME):
        found += await learners.infer(_unlearned(rollouts[first : first + _AT_A_TIME]), temperature=1.0)
    return found


class PairData:
    """Batches of pairs that carry the reference's log-probs, and pairs on which the policy is only measured."""

    def __init__(
        self,
        pairs: Sequence[PairRollouts],
        held_out: Sequence[PairRollouts],
        *,
        stage: PreferenceConfig,
        loss: PairLoss,
        reference: Reference,
        seed: int,
    ) -> None:
        self._pairs, self._held_out = list(pairs), list(held_out)
        self._stage, self._loss, self._reference, self._seed = stage, loss, reference, seed

    async def prepare(self, learners: LearnerGroup) -> None:
        """Give all pairs the reference's log-probs, where the loss looks at them."""
        if self._loss in _WITHOUT_REFERENCE:
            return
        every = [*self._pairs, *self._held_out]
        flat = [rollout for pair in every for rollout in pair[:2]]
        self._take(await self._reference.given_to(flat, learners))

    def _take(self, flat: Sequence[Rollout]) -> None:
        every = [*self._pairs, *self._held_out]
        new = [
            PairRollouts(chosen, rejected, pair.margin)
            for pair, chosen, rejected in zip(every, flat[0::2], flat[1::2], strict=True)
        ]
        self._pairs, self._held_out = new[: len(self._pairs)], new[len(self._pairs) :]

    async def batch(self, step: int, _learners: LearnerGroup) -> StepData:
        """The pairs of this step."""
        return pair_batch([pair[:2] for pair in self._of_step(step)]), {}

    def _of_step(self, step: int) -> list[PairRollouts]:
        return of_step(self._pairs, step, self._stage.pairs_per_step, self._seed)

    async def measured(self, learners: LearnerGroup) -> dict[str, float]:
        """What the policy makes of the held-out pairs now; nothing where there are none."""
        if not self._held_out:
            return {}
        flat = [rollout for pair in self._held_out for rollout in pair[:2]]
        return compared(flat, await logprobs_of(flat, learners), stage=self._stage, loss=self._loss)


class LabelledData(PairData):
    """Both answers of each pair with a label of its own, and each problem with the answer to another one, for KTO.

    The last is what KTO measures its baseline on, with the current policy and over the whole batch. Held-out pairs are
    compared by KTO's rewards, which are those of DPO; it has no loss over pairs.
    """

    def __init__(
        self,
        pairs: Sequence[PairRollouts],
        held_out: Sequence[PairRollouts],
        *,
        stage: PreferenceConfig,
        reference: Reference,
        seed: int,
        limit: int,
        place: str,
    ) -> None:
        super().__init__(pairs, held_out, stage=stage, loss=dpo, reference=reference, seed=seed)
        self._others = mismatches(pairs, limit=limit, place=place)

    async def prepare(self, learners: LearnerGroup) -> None:
        """Give all pairs and mismatched answers the reference's log-probs."""
        every = [*self._pairs, *self._held_out]
        flat = [*(rollout for pair in every for rollout in pair[:2]), *self._others]
        flat = await self._reference.given_to(flat, learners)
        self._take(flat[: 2 * len(every)])
        self._others = flat[2 * len(every) :]

    async def batch(self, step: int, learners: LearnerGroup) -> StepData:
        """The answers of this step, and the baseline."""
        both = list(zip(self._pairs, self._others, strict=True))
        found = of_step(both, step, self._stage.pairs_per_step, self._seed)
        others = [other for _, other in found]
        current = await learners.infer(_unlearned(others), temperature=1.0)
        ratios = [
            float(logprobs.sum() - rollout.logprobs.sum()) for logprobs, rollout in zip(current, others, strict=True)
        ]
        answers = [rollout for pair, _ in found for rollout in pair[:2]]
        return labelled_batch(answers, [True, False] * len(found)), {"kl_baseline": max(0.0, float(np.mean(ratios)))}

    async def measured(self, learners: LearnerGroup) -> dict[str, float]:
        """Without DPO's loss, which is not learned."""
        found = await super().measured(learners)
        return {name: value for name, value in found.items() if name != "held_out_loss"}


def compared(
    flat: Sequence[Rollout], logprobs: Sequence[NDArray[np.float32]], *, stage: PreferenceConfig, loss: PairLoss
) -> dict[str, float]:
    """Means over pairs (chosen, rejected, chosen, ...) of the loss and its rewards, under `held_out_...`."""

    def sums(arrays: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        return torch.tensor([float(array.sum(dtype=np.float64)) for array in arrays], dtype=torch.float64)

    policy, reference = sums(logprobs), sums([rollout.logprobs for rollout in flat])
    lengths = torch.tensor([rollout.num_trained_tokens for rollout in flat])
    outputs = loss(
        PreferenceInputs(
            chosen_logprobs=policy[0::2],
            rejected_logprobs=policy[1::2],
            ref_chosen_logprobs=reference[0::2],
            ref_rejected_logprobs=reference[1::2],
            chosen_lengths=lengths[0::2],
            rejected_lengths=lengths[1::2],
            beta=stage.beta,
            label_smoothing=stage.label_smoothing,
            gamma=stage.gamma,
        )
    )
    found: Mapping[str, torch.Tensor] = {name: value for name, value in outputs.sums.items() if name in _HELD_OUT}
    means = {f"held_out_{name}": float(value) / len(outputs.loss) for name, value in found.items()}
    return {"held_out_loss": float(outputs.loss.mean()), **means}


def _unlearned(rollouts: Sequence[Rollout]) -> TrainBatch:
    """A batch to be looked at only."""
    return replace(labelled_batch(rollouts, [True] * len(rollouts)), num_tokens=1)
