"""Settings of the RL stage that exclude each other, each refused with the fix; and what the cluster must have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.config import CriticConfig, OptimizerConfig, RlConfig
from rlsys.config_file import load_config, to_yaml
from rlsys.errors import ConfigError
from rlsys.run import _demands

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"correction": "truncated"}, r"set rl\.trust_region=proximal"),
        ({"trust_region": "proximal", "correction_limit": 0.4}, r"correction_floor \(0\.5\) .* below .* \(0\.4\)"),
        ({"correction_floor": -0.1}, r"correction_floor \(-0\.1\) must be at least 0"),
        ({"kl_estimator": "k1"}, r"set rl\.kl_in=reward"),
        ({"kl_coef": -1.0}, r"rl\.kl_coef is -1"),
        ({"kl_schedule": "adaptive"}, "multiplies it, but that is 0"),
        ({"kl_schedule": "adaptive", "kl_coef": 0.1, "kl_target": 0.0}, "must be above 0"),
        ({"kl_schedule": "adaptive", "kl_coef": 0.1, "kl_horizon": 63.0}, "less than the 64 rollouts of one step"),
        ({"critic": CriticConfig(), "advantage": "rlsys.advantages:rloo"}, r"no effect beside rl\.critic"),
        ({"critic": CriticConfig(warmup_steps=100)}, r"less than rl\.steps"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_fix(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RlConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 0}, "at least one rank"),
        ({"gpus": 0.5}, "no GPU or one"),
        ({"gamma": 1.1}, r"rl\.critic\.gamma is 1\.1"),
        ({"lam": -0.1}, r"rl\.critic\.lam is -0\.1"),
        ({"clip": -1.0}, "0 does not clip"),
        ({"warmup_steps": -1}, "0 has no warm-up"),
    ],
)
def test_a_critic_that_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CriticConfig(**settings)


def test_a_critic_is_set_by_any_of_its_keys_and_read_back_the_same(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["rl.critic.lam=1.0", "rl.critic.optimizer.lr=2e-3"])
    assert config.rl.critic is not None
    assert (config.rl.critic.lam, config.rl.critic.optimizer.lr, config.rl.critic.count) == (1.0, 2e-3, 1)
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "copy.yaml") == config
    assert load_config(QUICKSTART).rl.critic is None


def test_the_settings_of_the_documentation_are_valid(tmp_path: Path) -> None:
    text = (QUICKSTART.parents[1] / "docs" / "algorithms.md").read_text()
    tree = yaml.safe_load(QUICKSTART.read_text())
    tree["actors"]["max_model_tokens"] = 32768
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        tree["rl"] |= yaml.safe_load(block)["rl"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "run.yaml")
    assert config.rl.budget(300) == 20480
    assert config.rl.critic is not None
    assert (config.rl.critic.gpus, config.rl.critic.warmup_steps, config.rl.whiten_advantages) == (1.0, 2, True)


def test_the_ranks_of_a_critic_are_asked_of_the_cluster_where_the_stage_runs() -> None:
    config = load_config(QUICKSTART, ["rl.critic={count: 3, cpus: 2, resources: {critic: 1}}"])
    learners, critic = _demands(config, ["sft", "rl"])[-2:]
    assert (learners.what, learners.count, learners.cpus) == ("learner rank", 2, 0.5)
    assert (critic.what, critic.count, critic.cpus, critic.resources) == ("critic rank", 3, 2.0, {"critic": 1.0})
    assert [demand.what for demand in _demands(config, ["sft"])] == ["learner rank"]
    without = load_config(QUICKSTART)
    assert "critic rank" not in [demand.what for demand in _demands(without, ["sft", "rl", "eval"])]


def test_a_warm_up_may_be_a_share_of_the_steps() -> None:
    assert OptimizerConfig(warmup_share=0.1).warmup_of(250) == 25
    assert OptimizerConfig(warmup_steps=7).warmup_of(250) == 7
    with pytest.raises(ConfigError, match=r"warmup_steps \(7\) and warmup_share \(0\.1\) say one thing twice"):
        OptimizerConfig(warmup_steps=7, warmup_share=0.1)
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_share is 1; a share of the steps"):
        OptimizerConfig(warmup_share=1.0)
