"""The configuration of the stages: what each of them does, with which optimizer and how it samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from rlsys.plug_in_config import PlugIn, require

Aggregation = Literal["token", "sequence", "constant"]
TrustRegion = Literal["rollout", "proximal"]
Correction = Literal["none", "truncated", "masked", "sequence_truncated", "sequence_masked"]


def require_a_length(section: str, steps: int | None, epochs: float | None) -> None:
    """Refuse a stage that is given both a number of steps and of epochs, or one that is no length."""
    require(steps is None or epochs is None, f"{section}.steps and {section}.epochs are both given; leave one out")
    require(steps is None or steps >= 1, f"{section}.steps is {steps}; at least 1 is needed")
    require(
        epochs is None or (epochs > 0 and math.isfinite(epochs)), f"{section}.epochs is {epochs}; it must be above 0"
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the matrices in the decoder layers, each scaled so that the learning rate
    and decay of AdamW fit (Moonlight, arXiv 2502.16982); all other weights keep AdamW. FSDP2 only."""
    lr: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    warmup_share: float = 0.0
    """The same as a share of all steps of the stage, in place of `warmup_steps`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to a tenth of the peak at the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays. Muon's one momentum is its usual 0.95."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_skipped_steps: int = 5
    """So many non-finite gradients in a row stop the run."""

    def __post_init__(self) -> None:
        require(
            0 <= self.warmup_share < 1,
            f"optimizer.warmup_share is {self.warmup_share:g}; a share of the steps is at least 0 and below 1",
        )
        require(
            not (self.warmup_share and self.warmup_steps),
            f"optimizer: warmup_steps ({self.warmup_steps}) and warmup_share ({self.warmup_share:g}) say one thing "
            "twice; leave one out",
        )

    def warmup_of(self, total_steps: int) -> int:
        """Steps of the warm-up in a stage of so many."""
        return round(self.warmup_share * total_steps) if self.warmup_share else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How rollouts are sampled."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus; 1 keeps the whole distribution."""
    max_response_tokens: int = 256
    """Budget of one rollout after its prompt: generated tokens and tool output."""
    max_tool_calls: int = 4
    """Budget of tool calls in one rollout."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A critic makes it PPO: a second network, as large as the policy, that says what a rollout will still earn.

    Its ranks are learners of the class, options and number format of `learners`.
    """

    count: int = 1
    """Ranks; the parameters are sharded over them."""
    cpus: float = 0.0
    """CPUs that Ray reserves for each rank."""
    gpus: float = 0.0
    """GPUs for each rank: 0 or 1."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources for each, such as `{critic: 1}`."""
    gamma: float = 1.0
    """Discount for each token."""
    lam: float = 0.95
    """GAE's weight of later values: 1 takes the whole return, 0 only the next value."""
    clip: float = 0.2
    """A value counts only so far away from what it was before the step's updates; 0 does not clip."""
    warmup_steps: int = 0
    """So many policy steps at first train the critic alone."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Optimizer of the critic."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"rl.critic.count is {self.count}; at least one rank is needed")
        require(self.gpus in (0.0, 1.0), f"rl.critic.gpus is {self.gpus}; a rank drives no GPU or one")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"rl.critic.{name} is {value}; it lies between 0 and 1")
        require(self.clip >= 0, f"rl.critic.clip is {self.clip}; 0 does not clip")
        require(self.warmup_steps >= 0, f"rl.critic.warmup_steps is {self.warmup_steps}; 0 has no warm-up")


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Learning from pairs of answers of which one is better."""

    pairs: PlugIn | None = None
    """Function of (training problems, ...) that returns a list of `PreferencePair`."""
    loss: str = "rlsys.preference:dpo"
    """Function from `PreferenceInputs` to `PreferenceOutputs`, or `rlsys.preference:kto`."""
    beta: float = 0.1
    """The loss's beta: its meaning and scale differ (0.1 is usual for DPO, 2 for SimPO)."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be the wrong way round (DPO and robust DPO)."""
    gamma: float = 0.0
    """Margin of SimPO."""
    nll_coef: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood beside the loss (RPO)."""
    steps: int | None = None
    """Optimizer steps; 100 where `epochs` is not given either."""
    epochs: float | None = None
    """Instead of `steps`: how often all pairs are learned from."""
    pairs_per_step: int = 32
    """Pairs in one optimizer step."""
    max_tokens: int | None = None
    """The longest sequence, prompt and answer together; without it, `actors.max_model_tokens`."""
    too_long: Literal["error", "drop"] = "error"
    """A pair with a longer side is an error, or dropped and counted."""
    held_out_share: float = 0.0
    """Share of the problems whose pairs are never learned from: accuracy and margin are measured on them."""
    held_out_every: int = 0
    """Steps between these measurements; 0 measures at the end only."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    """Optimizer of this stage."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_a_length("preference", self.steps, self.epochs)
        require(self.beta > 0, f"preference.beta is {self.beta}; it must be above 0")
        require(self.pairs_per_step >= 1, f"preference.pairs_per_step is {self.pairs_per_step}; at least 1 is needed")
        require(
            self.max_tokens is None or self.max_tokens >= 2,
            f"preference.max_tokens is {self.max_tokens}; at least 2, or null for actors.max_model_tokens",
        )
        require(
            0 <= self.held_out_share < 1,
            f"preference.held_out_share is {self.held_out_share}; a share is at least 0 and below 1",
        )
        require(
            self.held_out_every >= 0, f"preference.held_out_every is {self.held_out_every}; 0 measures at the end only"
        )
        require(
            self.held_out_share > 0 or not self.held_out_every,
            "preference.held_out_every measures held-out pairs, but preference.held_out_share is 0; set it as well",
        )


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A reward model from pairs (Bradley-Terry): one number in the place of the output head."""

    pairs: PlugIn | None = None
    """Function of (training problems, ...) that returns a list of `PreferencePair`."""
    steps: int | None = None
    """Optimizer steps; 100 where `epochs` is not given either."""
    epochs: float | None = None
    """Instead of `steps`: how often all pairs are learned from."""
    pairs_per_step: int = 32
    """Pairs in one optimizer step."""
    too_long: Literal["error", "drop"] = "error"
    """A pair with an answer that does not fit into `actors.max_model_tokens` is an error, or dropped and counted."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Optimizer of this stage."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_a_length("reward_model", self.steps, self.epochs)
        require(self.pairs_per_step >= 1, f"reward_model.pairs_per_step is {self.pairs_per_step}; at least 1 is needed")


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Reinforcement learning with verifiable rewards."""

    steps: int = 100
    """Policy steps (weight publications)."""
    groups_per_step: int = 8
    """Problems in one policy step."""
    group_size: int = 8
    """Rollouts of one problem."""
    updates_per_step: int = 1
    """Optimizer steps on the batch of one policy step; 1 is strictly on-policy."""
    max_staleness: int = 0
    """Weights may be at most so many versions newer than those a rollout began with; 0 is synchronous."""
    update: Literal["in_flight", "at_groups"] = "in_flight"
    """When engines get new weights: `in_flight`, at once, and what is being generated goes on with them; `at_groups`,
    when all groups that are being generated have ended and before others start, so that one version writes a group.
    With `max_staleness` 0 there is no difference."""
    advantage: str = "rlsys.advantages:grpo"
    """Function from the rewards of a group [G] to their advantages [G]."""
    whiten_advantages: bool = False
    """Bring the advantages of a whole batch, with a critic those of its tokens, to mean 0 and standard deviation 1."""
    critic: CriticConfig | None = None
    """Advantages from a critic by GAE, in place of `advantage`: PPO."""
    loss: str = "rlsys.losses:clipped_policy_gradient"
    """Function from `LossInputs` to `LossOutputs`."""
    aggregation: Aggregation = "token"
    """How the losses of tokens become one: their mean (DAPO); `sequence`, the mean over rollouts of each one's mean
    (GRPO as published, GSPO); `constant`, sums over rollouts divided by `sampling.max_response_tokens`, so that length
    does not matter (Dr.GRPO)."""
    clip_low: float = 0.2
    """Lower trust region: the ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """Upper trust region: the ratio counts up to 1 + clip_high."""
    trust_region: TrustRegion = "rollout"
    """What the ratio compares the current policy with: `rollout`, the policy that wrote the token; `proximal`, the one
    before the first update of this step. Then how far that one is from the former is a factor of its own, and may be
    corrected (decoupled PPO, AReaL)."""
    correction: Correction = "none"
    """How the factor proximal / rollout is bounded: `truncated` at `correction_limit`; `masked`, 0 outside of
    `correction_floor` to `correction_limit`; `sequence_...`, the same for the product over a sequence's tokens."""
    correction_limit: float = 2.0
    """The largest factor."""
    correction_floor: float = 0.5
    """The smallest factor that still trains, where it is masked."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to a frozen policy, the reference; 0 loads none."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty stands: in the loss, with a gradient, or in the reward before advantages."""
    reference_every: int = 0
    """Policy steps after which the current policy becomes the reference; 0 keeps the one the stage began with."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL penalty is estimated from the sampled token; k1 is for the reward only."""
    kl_schedule: Literal["constant", "cosine", "adaptive"] = "constant"
    """The KL weight stays, falls by a cosine to 0 at the last step, or is steered towards `kl_target`."""
    kl_target: float = 6.0
    """The KL of a whole rollout, in nats, that the adaptive weight aims at."""
    kl_horizon: float = 10000.0
    """Rollouts over which the adaptive weight changes; fewer make it faster."""
    skip_uninformative: bool = False
    """Leave out groups whose rewards are all equal and sample others in their place."""
    give_up_after: int = 0
    """Where the first so many siblings, by their numbers and not by when they end, all have the same reward, the others
    are ended and the group is dropped as `given_up`; 0 never does. Not with rewards that compare siblings."""
    selections: list[str] = field(default_factory=list)
    """Functions from a `RolloutGroup` to one bool for each sibling, whether it trains, such as
    `rlsys.selection:completed_only`; each sees what the one before it left."""
    rest_uninformative: bool = False
    """A problem whose siblings were all rewarded alike is left out of its next turn, then of 2, 4, at most 8."""
    difficulty: str | None = None
    """Key of a number in the problems' metadata: those with small ones first, or with `-` in front, as in `-pass_rate`,
    those with large ones."""
    difficulty_start: float = 0.25
    """With `difficulty`, the share of problems, the easiest ones, that the first step draws from; it grows to all of
    them at the last."""
    max_skipped_groups: int = 256
    """So many skipped groups in a row stop the run with an error instead of sampling for ever."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of training rollouts."""
    response_tokens: dict[int, int] = field(default_factory=dict)
    """A growing budget: from the policy step on, `max_response_tokens` of the rollouts that begin then, such as
    `{1: 8192, 300: 20480}`; the last one is that of `sampling`, for which the context must have room."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of this stage."""
    max_logprob_gap: float = 0.1
    """The run stops where learner and engine differ by more than this (mean absolute difference of the log-probs of
    tokens that the same weights wrote): then ids, masks, temperature or weights disagree. Seen: 1e-7 with float32."""
    eval_every: int = 0
    """Policy steps between held-out evaluations; 0 measures only before and after."""
    checkpoint_every: int = 10
    """Policy steps between checkpoints."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""

    def __post_init__(self) -> None:
        require(self.group_size >= 2, "rl.group_size must be at least 2: a group is compared with itself")
        require(self.reference_every >= 0, f"rl.reference_every is {self.reference_every}; 0 keeps the reference")
        require(self.keep_checkpoints >= 1, f"rl.keep_checkpoints is {self.keep_checkpoints}; keep at least 1")
        require(
            self.give_up_after == 0 or 2 <= self.give_up_after < self.group_size,
            f"rl.give_up_after is {self.give_up_after}; it is 0, or from 2 to one less than rl.group_size "
            f"({self.group_size})",
        )
        require(self.max_staleness >= 0, f"rl.max_staleness is {self.max_staleness}; 0 is synchronous")
        require(
            self.sampling.top_p == 1.0 and self.sampling.temperature > 0,
            "rl.sampling: train with top_p=1 and temperature above 0; otherwise the engine's log-probs are not "
            "the policy's (rl.sampling.top_p=1.0)",
        )
        require(
            self.groups_per_step * self.group_size >= self.updates_per_step,
            f"rl.updates_per_step is {self.updates_per_step}, more than the rollouts of one step",
        )
        self._require_one_trust_region()
        self._require_a_meaningful_kl()
        self._require_a_schedule()
        require(
            0 < self.difficulty_start <= 1,
            f"rl.difficulty_start is {self.difficulty_start:g}; a share of the problems is above 0 and at most 1",
        )
        require(
            self.critic is None or self.critic.warmup_steps < self.steps,
            "rl.critic.warmup_steps leaves no step to the policy; it must be less than rl.steps",
        )
        require(
            self.critic is None or self.advantage == RlConfig.advantage,
            f"rl.advantage={self.advantage} has no effect beside rl.critic, which assigns credit itself; leave one out",
        )

    def _require_one_trust_region(self) -> None:
        require(
            self.correction == "none" or self.trust_region == "proximal",
            f"rl.correction={self.correction} bounds the factor between the proximal policy and the one that wrote the "
            "token; with rl.trust_region=rollout that is inside the clipped ratio: set rl.trust_region=proximal",
        )
        require(
            0 <= self.correction_floor < self.correction_limit,
            f"rl.correction_floor ({self.correction_floor:g}) must be at least 0 and below rl.correction_limit "
            f"({self.correction_limit:g})",
        )

    def budget(self, step: int) -> int:
        """Tokens that a rollout which begins for policy step `step` (from 1) may take after its prompt."""
        begun = [first for first in self.response_tokens if first <= step]
        return self.response_tokens[max(begun)] if begun else self.sampling.max_response_tokens

    def _require_a_schedule(self) -> None:
        most = self.sampling.max_response_tokens
        require(
            not self.response_tokens or min(self.response_tokens) == 1,
            f"rl.response_tokens={self.response_tokens} says nothing of step 1; begin with `1: tokens`",
        )
        for first, tokens in self.response_tokens.items():
            require(
                1 <= tokens <= most,
                f"rl.response_tokens: {tokens} from step {first}; the most is rl.sampling.max_response_tokens ({most})",
            )

    def _require_a_meaningful_kl(self) -> None:
        require(self.kl_coef >= 0, f"rl.kl_coef is {self.kl_coef:g}; a penalty is not negative, 0 is none")
        require(
            self.kl_estimator != "k1" or self.kl_in == "reward",
            "rl.kl_estimator=k1 has in the loss a gradient of zero on average; take k2 or k3, or set rl.kl_in=reward",
        )
        require(
            self.kl_schedule != "adaptive" or self.kl_coef > 0,
            "rl.kl_schedule=adaptive starts from rl.kl_coef and multiplies it, but that is 0",
        )
        require(
            self.kl_target > 0 and self.kl_horizon > 0,
            f"rl.kl_target ({self.kl_target:g}) and rl.kl_horizon ({self.kl_horizon:g}) must be above 0",
        )
        num_rollouts = self.groups_per_step * self.group_size
        require(
            self.kl_schedule != "adaptive" or num_rollouts <= self.kl_horizon,
            f"rl.kl_horizon ({self.kl_horizon:g}) is less than the {num_rollouts} rollouts of one step; raise it",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation."""

    samples_per_problem: int = 1
    """Rollouts of each problem; accuracy is their mean."""
    greedy: bool = False
    """One greedy rollout of each problem besides: `accuracy_greedy`."""
    max_problems: int | None = None
    """Only the first so many problems."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of evaluation rollouts."""
