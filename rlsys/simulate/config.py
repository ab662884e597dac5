"""The numbers of the models that stand for engines, learner, network, tools and faults in a simulation."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.plug_in_config import require


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """What `rlsys simulate` takes for a machine and a policy; everything else is in the run's own sections.

    The defaults are a dense model of 7 billion parameters in bfloat16, one H100 for each engine and learner rank:
    arithmetic on data sheets (see docs/simulate.md), not measurements.
    """

    decode_seconds: float = 0.008
    """What an engine takes for one token of each rollout that it generates, but for the share that grows with them, s:
    mostly reading the weights from memory."""
    decode_seconds_per_rollout: float = 0.00007
    """What every rollout adds to that, s: mostly reading its keys and values."""
    prefill_tokens_per_second: float = 20_000.0
    """Prompt tokens that an engine takes in; siblings share a prompt. Meanwhile it writes none."""
    prompt_tokens: int = 256
    """Tokens of a prompt."""
    response_tokens: float = 2_000.0
    """Median of the tokens that the policy writes in one rollout; lognormal, at most
    `rl.sampling.max_response_tokens`."""
    response_tokens_p99: float = 16_000.0
    """Of a hundred rollouts one is longer than this, were there no limit."""
    problem_share: float = 0.5
    """Share of the (logarithmic) variance of lengths that siblings have in common: some problems are long."""
    tool_calls: float = 0.0
    """Mean number of tool calls in a rollout (Poisson)."""
    tool_seconds: float = 0.3
    """Median of what a call takes, s; lognormal."""
    tool_seconds_p99: float = 3.0
    """Of a hundred calls one takes longer."""
    reward_seconds: float = 0.01
    """What grading a rollout takes, s."""
    rollouts: str | None = None
    """A run's directory: prompts, lengths, tool and reward seconds are those of its training rollouts, problem by
    problem, in place of the seven numbers above."""
    uninformative: float = 0.0
    """Share of the groups whose siblings are all rewarded alike."""
    learn_seconds: float = 1.0
    """What one policy step takes however few tokens it has, s."""
    learn_seconds_per_token: float = 1.3e-4
    """What one learner rank takes for one token of prompt or response, s; ranks divide the tokens evenly."""
    step_seconds: float = 0.0
    """What the driver does besides in every policy step: credit, records, s."""
    weight_bytes: float = 15.2e9
    """Size of the published weights, bytes."""
    link_bytes_per_second: float = 50e9
    """What one sender's link carries, bytes/s: 450e9 within a machine, 50e9 over 400 Gb/s, 3e9 over Ethernet."""
    senders: int = 1
    """Learner ranks that send their share of the weights side by side; 1 is a broadcast from the first."""
    sync_seconds: float = 0.1
    """What publishing takes however few bytes there are, s."""
    start_seconds: float = 60.0
    """What an engine takes from being placed to its first answer, s."""
    hours_between_deaths: float | None = None
    """Mean time between the deaths of one worker, h (exponential); null is never."""
    hang_share: float = 0.0
    """Share of the deaths that are silent: the worker answers no more and nothing says so."""

    def __post_init__(self) -> None:
        for name in (
            "decode_seconds",
            "prefill_tokens_per_second",
            "response_tokens",
            "tool_seconds",
            "link_bytes_per_second",
            "senders",
        ):
            require(getattr(self, name) > 0, f"simulate.{name} is {getattr(self, name):g}; it must be above 0")
        for name in (
            "decode_seconds_per_rollout",
            "prompt_tokens",
            "tool_calls",
            "reward_seconds",
            "learn_seconds",
            "learn_seconds_per_token",
            "step_seconds",
            "weight_bytes",
            "sync_seconds",
            "start_seconds",
        ):
            require(getattr(self, name) >= 0, f"simulate.{name} is {getattr(self, name):g}; it cannot be below 0")
        for name in ("problem_share", "uninformative", "hang_share"):
            require(
                0 <= getattr(self, name) <= 1, f"simulate.{name} is {getattr(self, name):g}; a share is from 0 to 1"
            )
        for name in ("response_tokens", "tool_seconds"):
            median, high = getattr(self, name), getattr(self, f"{name}_p99")
            require(high >= median, f"simulate.{name}_p99 ({high:g}) is below the median, simulate.{name} ({median:g})")
        require(
            self.hours_between_deaths is None or self.hours_between_deaths > 0,
            f"simulate.hours_between_deaths is {self.hours_between_deaths}; it must be above 0, or null for never",
        )

    @property
    def transfer_seconds(self) -> float:
        """What publishing weights takes, from frozen engines to proved weights."""
        return self.sync_seconds + self.weight_bytes / self.senders / self.link_bytes_per_second

    def learner_seconds(self, tokens: int, ranks: int) -> float:
        """What `ranks` learner ranks take for a policy step on so many tokens."""
        return self.learn_seconds + tokens * self.learn_seconds_per_token / ranks
