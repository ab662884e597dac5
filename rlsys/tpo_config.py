"""The configuration of iterated Thought Preference Optimization."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlsys.plug_in_config import require
from rlsys.stage_config import PreferenceConfig, SamplingConfig

_EPOCHS = 10.0


@dataclass(frozen=True, kw_only=True)
class TpoConfig:
    """Iterations: sample answers to fresh problems, let the run's `rewards` judge them, learn from best against worst.

    With `chat.thought` the answers have hidden thoughts (TPO, arXiv 2410.10630); without, it is the paper's baseline,
    the direct one.
    """

    iterations: int = 4
    """How often."""
    problems_per_iteration: int = 5000
    """Problems of `data.train` in one iteration; none of them is in another one."""
    samples_per_problem: int = 8
    """Answers to each problem."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.8, top_p=0.95))
    """How they are sampled."""
    max_length_weight: float = 0.5
    """The most that the length of a response may weigh against its score; 0 leaves length alone."""
    length_weight_step: float = 0.05
    """The weight is the first of 0, one step, two steps, ... at which chosen responses are not longer than rejected
    ones, on average."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """How an iteration learns from its pairs; without steps or epochs, 10 epochs. Every iteration has an optimizer of
    its own; the reference is the model that the iteration began with."""
    validation_problems: int = 128
    """So many problems of `data.train` are never learned from: the judge's score on them says which weights of an
    iteration are kept."""
    validation_samples: int = 1
    """Answers to each of them, sampled as `eval.sampling` says."""
    validate_every: int = 0
    """Optimizer steps between two looks at them; 0: after every epoch. The last step of an iteration is looked at."""
    problems_per_part: int = 64
    """Problems between two saves while sampling: a run that was killed does those again that came behind the last."""
    max_problems_in_flight: int = 128
    """Problems that are being answered at one time."""

    def __post_init__(self) -> None:
        for name in (
            *("iterations", "problems_per_iteration", "validation_problems", "validation_samples"),
            *("problems_per_part", "max_problems_in_flight"),
        ):
            require(getattr(self, name) >= 1, f"tpo.{name} is {getattr(self, name)}; at least 1 is needed")
        require(
            self.samples_per_problem >= 2,
            f"tpo.samples_per_problem is {self.samples_per_problem}; a pair needs at least 2",
        )
        require(
            self.sampling.temperature > 0,
            "tpo.sampling.temperature is 0: all answers to a problem would be the same; set it above 0",
        )
        require(
            self.max_length_weight >= 0 and self.length_weight_step > 0,
            f"tpo.max_length_weight ({self.max_length_weight:g}) must be at least 0 and tpo.length_weight_step "
            f"({self.length_weight_step:g}) above 0",
        )
        require(self.validate_every >= 0, f"tpo.validate_every is {self.validate_every}; 0 is once an epoch")
        require(
            self.preference.pairs is None,
            "tpo.preference.pairs is set, but the pairs are those of the iteration; leave it out",
        )
        require(
            not self.preference.loss.endswith(":kto"),
            "tpo.preference.loss: kto takes no pairs of best and worst; use one such as rlsys.preference:dpo",
        )

    @property
    def learning(self) -> PreferenceConfig:
        """`preference` with the length of training filled in."""
        given = self.preference
        return given if given.steps is not None or given.epochs is not None else replace(given, epochs=_EPOCHS)

    @property
    def problems_needed(self) -> int:
        """Problems that `data.train` must have."""
        return self.iterations * self.problems_per_iteration + self.validation_problems
