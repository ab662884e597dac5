"""The configuration: frozen dataclasses, one per section; the text under a field is its help.

A file is merged over the defaults and the command line over the file. Afterwards only plain dataclasses exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlsys.plug_in_config import ANSWER_SECONDS as ANSWER_SECONDS
from rlsys.plug_in_config import PlugIn as PlugIn
from rlsys.plug_in_config import PoolConfig as PoolConfig
from rlsys.plug_in_config import PooledPlugIn as PooledPlugIn
from rlsys.plug_in_config import RewardConfig as RewardConfig
from rlsys.plug_in_config import require as require
from rlsys.scratch import ScratchModel

STAGES = ("sft", "rl", "eval")
Aggregation = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the first stage starts from."""

    path: str | None = None
    """A local folder or a hub name in `save_pretrained` layout."""
    scratch: ScratchModel | None = None
    """Build a small model from these numbers instead, with random weights."""

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.scratch is None),
            "model: give either `path` (a folder or hub name) or `scratch` (build a small model), not both or none",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Problems to learn from and problems to be measured on."""

    train: PlugIn
    """Source of training problems: a function that returns a list of `Problem`."""
    held_out: PlugIn
    """Source of the problems that accuracy is measured on; none of them may be in `train`."""
    too_long: Literal["skip", "error"] = "skip"
    """A prompt that leaves no room in the context is skipped and counted, or is an error."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How a problem becomes tokens, and how the policy calls tools."""

    tool_format: Literal["fenced", "template"] = "fenced"
    """`fenced`: a ```python block inside the answer, its output pasted behind it (STILL-3). `template`: `<tool_call>`
    JSON, tools and results rendered by the model's chat template."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template, such as `{enable_thinking: true}`."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The Ray cluster."""

    address: str | None = None
    """Address of a running cluster; without one, RAY_ADDRESS, and without that a cluster on this machine."""
    wait_seconds: float = 30.0
    """How long the cluster may take to have (or scale up to) what the run asks for."""
    call_seconds: float = 1800.0
    """Deadline of any one call to an actor; no wait is without one."""


@dataclass(frozen=True, kw_only=True)
class ActorsConfig:
    """Rollout actors: each hosts one vLLM engine and carries many rollouts at once."""

    count: int = 2
    """How many rollout actors."""
    cpus: float = 1.0
    """CPUs that Ray reserves for each."""
    gpus: float = 0.0
    """GPUs for each (the engine's tensor-parallel size)."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources for each, such as `{rollout: 1}`, to place them on nodes of their own."""
    use: str = "rlsys.actors.rollout:RolloutActor"
    """The actor class."""
    max_rollouts: int = 64
    """Rollouts in flight in one actor; also vLLM's `max_num_seqs`."""
    max_model_tokens: int = 512
    """The context: prompt, generated text and tool output together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The engine's number format."""
    kv_cache_gib: int = 1
    """Memory for keys and values in a CPU engine, GiB."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Anything else for vLLM's `AsyncEngineArgs`."""
    start_seconds: float = 600.0
    """Deadline for an engine to load and answer."""
    sync_seconds: float = 300.0
    """Deadline for one weight update, measured outside the collective."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"actors.count is {self.count}; at least one rollout actor is needed")
        require(self.gpus == int(self.gpus), f"actors.gpus is {self.gpus}; an engine takes whole GPUs")


@dataclass(frozen=True, kw_only=True)
class LearnersConfig:
    """The learner group."""

    count: int = 2
    """Ranks; the parameters are sharded over them."""
    cpus: float = 1.0
    """CPUs that Ray reserves for each rank."""
    gpus: float = 0.0
    """GPUs for each rank: 0 or 1."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources for each, such as `{learner: 1}`."""
    use: str = "rlsys.learners.fsdp:FsdpLearner"
    """The learner class."""
    options: dict[str, Any] = field(default_factory=dict)
    """The learner class's own, such as `{stage: 2}` of the DeepSpeed learner."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the forward and backward pass; master weights and reductions stay float32."""
    max_tokens_per_micro_batch: int = 8192
    """Token budget of one forward and backward pass on one rank."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 25 % slower."""
    start_seconds: float = 600.0
    """Deadline for all ranks to load the model and meet."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"learners.count is {self.count}; at least one rank is needed")
        require(self.gpus in (0.0, 1.0), f"learners.gpus is {self.gpus}; a rank drives no GPU or one")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to a tenth of the peak at the last step."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    max_skipped_steps: int = 5
    """So many non-finite gradients in a row stop the run."""


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
class SftConfig:
    """Supervised fine-tuning on demonstrations."""

    demonstrations: PlugIn | None = None
    """Function of (training problems, ...) that returns a list of `Demonstration`."""
    steps: int = 100
    """Optimizer steps."""
    demonstrations_per_step: int = 64
    """Demonstrations in one optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Optimizer of this stage."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""


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
    advantage: str = "rlsys.advantages:grpo"
    """Function from the rewards of a group [G] to their advantages [G]."""
    whiten_advantages: bool = False
    """Bring the advantages of a whole batch to mean 0 and standard deviation 1 (REINFORCE++)."""
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
    kl_coef: float = 0.0
    """Weight of the KL penalty to a frozen policy, the reference; 0 loads none."""
    reference_every: int = 0
    """Policy steps after which the current policy becomes the reference; 0 keeps the one the stage began with."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """How the KL penalty is estimated from the sampled token."""
    kl_schedule: Literal["constant", "cosine"] = "constant"
    """The KL weight stays, or falls by a cosine to 0 at the last step."""
    skip_uninformative: bool = False
    """Leave out groups whose rewards are all equal and sample others in their place."""
    selections: list[str] = field(default_factory=list)
    """Functions from a `RolloutGroup` to one bool for each sibling, whether it trains, such as
    `rlsys.selection:completed_only`; each sees what the one before it left."""
    max_skipped_groups: int = 256
    """So many skipped groups in a row stop the run with an error instead of sampling for ever."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of training rollouts."""
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


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation."""

    samples_per_problem: int = 1
    """Rollouts of each problem; accuracy is their mean."""
    max_problems: int | None = None
    """Only the first so many problems."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of evaluation rollouts."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    name: str
    """Name of the run."""
    run_dir: str = "runs/${name}"
    """Everything the run writes."""
    seed: int = 0
    """Seed of model building, problem order and sampling."""
    stages: list[str] = field(default_factory=lambda: ["rl"])
    """What to do, in order; each stage starts from the weights that the one before it left."""
    model: ModelConfig
    data: DataConfig
    chat: ChatConfig = field(default_factory=ChatConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    learners: LearnersConfig = field(default_factory=LearnersConfig)
    rewards: list[RewardConfig] = field(default_factory=list)
    """Terms of the reward, summed; the first one decides what counts as correct."""
    max_failed_rewards: float = 0.25
    """A run stops where more than this share of the rollouts of one policy step, or of one evaluation, could not be
    graded, dropped and zeroed ones together."""
    tools: list[PooledPlugIn] = field(default_factory=list)
    """What the policy may call."""
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides `metrics.jsonl`, which is always written: `tensorboard`."""

    def __post_init__(self) -> None:
        require(bool(self.stages), f"stages is empty; give at least one of {', '.join(STAGES)}")
        for stage in self.stages:
            require(stage in STAGES, f"stages: unknown stage {stage!r}; known: {', '.join(STAGES)}")
        require(len(set(self.stages)) == len(self.stages), f"stages: {self.stages} names a stage twice")
        require(bool(self.rewards), "rewards is empty; give one, such as `use: rlsys.rewards.math:MathReward`")
        names = [reward.name for reward in self.rewards]
        require(len(set(names)) == len(names), f"rewards: the names {names} must differ; set `name`")
        require(
            0 <= self.max_failed_rewards <= 1,
            f"max_failed_rewards is {self.max_failed_rewards}; a share lies between 0 and 1 (never stop)",
        )
        require(
            "sft" not in self.stages or self.sft.demonstrations is not None,
            "stages has `sft`, but sft.demonstrations is not set",
        )
        for section in ("rl", "eval"):
            budget = getattr(self, section).sampling.max_response_tokens
            require(
                budget < self.actors.max_model_tokens,
                f"{section}.sampling.max_response_tokens ({budget}) leaves no room for a prompt in "
                f"actors.max_model_tokens ({self.actors.max_model_tokens})",
            )
