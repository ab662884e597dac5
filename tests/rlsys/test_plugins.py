"""References and options: what resolves, and what a misspelt one is told."""

from typing import Any

import pytest

from rlsys import plugins
from rlsys.advantages import grpo
from rlsys.errors import ConfigError
from rlsys.plugins import build, check_options, resolve


class LengthAware:
    """A plug-in with a required and an optional option."""

    def __init__(self, *, target: int, weight: float = 1.0) -> None:
        self.target, self.weight = target, weight


def plain(problem: Any, response: str) -> float:
    return float(problem == response)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `rlsys.plugins:LengthAware` name the class above, whatever name this file was imported under."""
    monkeypatch.setattr(plugins, "LengthAware", LengthAware, raising=False)
    monkeypatch.setattr(plugins, "plain", plain, raising=False)


def test_a_reference_names_an_object_in_a_module() -> None:
    assert resolve("rlsys.advantages:grpo", place="rl.advantage") is grpo


def test_a_reference_may_name_an_attribute_of_an_object() -> None:
    assert resolve("rlsys.checkpoint:CheckpointStore.commit", place="here").__name__ == "commit"


def test_a_misspelt_object_names_the_place_and_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"rl\.advantage: .* no 'gpro'; did you mean `rlsys\.advantages:grpo`\?"):
        resolve("rlsys.advantages:gpro", place="rl.advantage")


def test_an_object_like_no_other_gets_no_hint() -> None:
    with pytest.raises(ConfigError, match=r"has no 'zzzzzz'$"):
        resolve("rlsys.advantages:zzzzzz", place="rl.advantage")


def test_a_module_that_does_not_exist_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.0: cannot import 'no_such_package\.reward'"):
        resolve("no_such_package.reward:Thing", place="rewards.0")


@pytest.mark.parametrize("reference", ["rlsys.advantages.grpo", "grpo", "", "my-package.reward:Thing", ":x", "a b:c"])
def test_a_text_that_is_no_reference_is_told_the_form(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"rl\.loss: .*`module:object`"):
        resolve(reference, place="rl.loss")


def test_a_misspelt_option_names_the_place_and_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.1\.options: unknown option 'tarjet'; did you mean `target`\?"):
        check_options(LengthAware, {"tarjet": 3}, place="rewards.1")


def test_an_option_like_no_other_is_shown_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: target, weight"):
        check_options(LengthAware, {"zzzzzz": 3}, place="rewards.1")


def test_a_required_option_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="target must be given"):
        check_options(LengthAware, {"weight": 2.0}, place="rewards.1")


def test_arguments_that_the_caller_gives_are_not_options() -> None:
    def source(problems: list[str], *, size: int, seed: int = 0) -> None: ...

    check_options(source, {"size": 3}, place="sft.demonstrations", given=1)
    with pytest.raises(ConfigError, match="unknown option 'problems'"):
        check_options(source, {"problems": [], "size": 3}, place="sft.demonstrations", given=1)


def test_whatever_takes_any_keyword_is_not_checked() -> None:
    def anything(**options: Any) -> None: ...

    check_options(anything, {"whatever": 1}, place="here")


def test_a_class_is_built_with_its_options() -> None:
    built = build("rlsys.plugins:LengthAware", {"target": 800}, place="rewards.0")
    assert isinstance(built, LengthAware)
    assert (built.target, built.weight) == (800, 1.0)


def test_a_class_is_checked_before_it_is_built() -> None:
    with pytest.raises(ConfigError, match="did you mean `target`"):
        build("rlsys.plugins:LengthAware", {"targe": 800}, place="rewards.0")


def test_a_plain_function_is_taken_as_it_is_and_takes_no_options() -> None:
    assert build("rlsys.plugins:plain", {}, place="rewards.0") is plain
    with pytest.raises(ConfigError, match="is a function and takes no options; make it a class"):
        build("rlsys.plugins:plain", {"weight": 1}, place="rewards.0")
