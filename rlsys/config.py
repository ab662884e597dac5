"""The configuration: frozen dataclasses, one per section; the text under a field is its help.

A file is merged over the defaults and the command line over the file. Afterwards only plain dataclasses exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlsys.actors_config import ActorsConfig as ActorsConfig
from rlsys.plug_in_config import ANSWER_SECONDS as ANSWER_SECONDS
from rlsys.plug_in_config import PlugIn as PlugIn
from rlsys.plug_in_config import PoolConfig as PoolConfig
from rlsys.plug_in_config import PooledPlugIn as PooledPlugIn
from rlsys.plug_in_config import RewardConfig as RewardConfig
from rlsys.plug_in_config import require as require
from rlsys.sample_config import SampleConfig as SampleConfig
from rlsys.scratch import ScratchModel
from rlsys.sft_config import SftConfig as SftConfig
from rlsys.simulate.config import SimulateConfig as SimulateConfig
from rlsys.stage_config import Aggregation as Aggregation
from rlsys.stage_config import CriticConfig as CriticConfig
from rlsys.stage_config import EvalConfig as EvalConfig
from rlsys.stage_config import OptimizerConfig as OptimizerConfig
from rlsys.stage_config import PreferenceConfig as PreferenceConfig
from rlsys.stage_config import RewardModelConfig as RewardModelConfig
from rlsys.stage_config import RlConfig as RlConfig
from rlsys.stage_config import SamplingConfig as SamplingConfig
from rlsys.thoughts import ThoughtConfig as ThoughtConfig
from rlsys.tpo_config import TpoConfig as TpoConfig

STAGES = ("sft", "preference", "reward_model", "tpo", "rl", "eval")


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
    thought: ThoughtConfig | None = None
    """The policy thinks before it responds, and rewards see only the response."""


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
class LoraConfig:
    """Low-rank adapters beside frozen weights; engines and exported folders get the two merged."""

    rank: int = 16
    """Rank of an adapter."""
    alpha: float = 32.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: list[str] | None = None
    """Names of the linear layers that get one, such as `[q_proj, v_proj]`; without, all but the output head."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"learners.lora.rank is {self.rank}; at least 1 is needed")
        require(self.alpha > 0, f"learners.lora.alpha is {self.alpha:g}; it must be above 0")
        require(self.targets is None or bool(self.targets), "learners.lora.targets is empty; null is all layers")


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
    lora: LoraConfig | None = None
    """Train adapters instead of the weights themselves (`pip install 'rlsys[lora]'`)."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """On GPUs: `sdpa`, torch's kernel for each sequence of a pack; `flex`, one FlexAttention kernel for all of it. On
    CPUs always our own."""
    liger: bool = False
    """Liger's kernels for norms, rotations and gated layers, on GPUs."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 25 % slower."""
    start_seconds: float = 600.0
    """Deadline for all ranks to load the model and meet."""

    def __post_init__(self) -> None:
        require(self.count >= 1, f"learners.count is {self.count}; at least one rank is needed")
        require(self.gpus in (0.0, 1.0), f"learners.gpus is {self.gpus}; a rank drives no GPU or one")
        for name, wanted in (("attention=flex", self.attention == "flex"), ("liger=true", self.liger)):
            require(not wanted or self.gpus > 0, f"learners.{name} has kernels for GPUs only, but learners.gpus is 0")


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
    samples: dict[str, SampleConfig] = field(default_factory=dict)
    """Stages that make data, by the names under which `stages` has them."""
    sft: SftConfig = field(default_factory=SftConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    tpo: TpoConfig = field(default_factory=TpoConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    simulate: SimulateConfig | None = None
    """What `rlsys simulate` takes for engines, learner, network and faults; a run itself takes no notice of it."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides `metrics.jsonl`, which is always written: `tensorboard`."""

    def __post_init__(self) -> None:
        require(bool(self.stages), f"stages is empty; give at least one of {', '.join(STAGES)}")
        known = [*STAGES, *self.samples]
        for stage in self.stages:
            require(stage in known, f"stages: unknown stage {stage!r}; known: {', '.join(known)}")
        for name in self.samples:
            require(name not in STAGES, f"samples.{name}: this is the name of another stage; take another one")
            require(name.isidentifier(), f"samples.{name}: the name of a stage is letters, digits and underscores")
        require(len(set(self.stages)) == len(self.stages), f"stages: {self.stages} names a stage twice")
        require(bool(self.rewards), "rewards is empty; give one, such as `use: rlsys.rewards.math:MathReward`")
        names = [reward.name for reward in self.rewards]
        require(len(set(names)) == len(names), f"rewards: the names {names} must differ; set `name`")
        require(
            0 <= self.max_failed_rewards <= 1,
            f"max_failed_rewards is {self.max_failed_rewards}; a share lies between 0 and 1 (never stop)",
        )
        require(
            self.learners.lora is None or not self.rl.reference_every,
            "rl.reference_every renews the reference, but with learners.lora that is the frozen model; leave one out",
        )
        require(
            "sft" not in self.stages or self.sft.demonstrations is not None,
            "stages has `sft`, but sft.demonstrations is not set",
        )
        for stage in ("preference", "reward_model"):
            require(
                stage not in self.stages or getattr(self, stage).pairs is not None,
                f"stages has `{stage}`, but {stage}.pairs is not set",
            )
        sections = {"rl", "tpo", "eval"} & {*self.stages, *(["eval"] if {"rl", "tpo"} & set(self.stages) else [])}
        budgets = {f"{section}.sampling": getattr(self, section).sampling for section in sorted(sections)}
        budgets |= {f"samples.{name}.sampling": stage.sampling for name, stage in self.samples.items()}
        for section, sampling in budgets.items():
            budget = sampling.max_response_tokens
            require(
                budget < self.actors.max_model_tokens,
                f"{section}.max_response_tokens ({budget}) leaves no room for a prompt in "
                f"actors.max_model_tokens ({self.actors.max_model_tokens})",
            )
