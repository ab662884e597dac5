"""Configuration files: read, override, check, and say where each value came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlsys.config import Config, require
from rlsys.errors import ConfigError

_T = TypeVar("_T")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, check everything.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown (names the nearest), a value has the
            wrong type, or two settings exclude each other.
    """
    return structure(Config, [read_tree(path)], overrides, place=str(path))


def structure(kind: type[_T], trees: Sequence[Mapping[str, Any]], overrides: Sequence[str] = (), *, place: str) -> _T:
    """A dataclass of these trees, each merged over the one before it, and of overrides; all is checked.

    A tree that names another plug-in (`use`) than the one before it does not inherit that one's `options`.

    Raises:
        ConfigError: as of `load_config`; begins with `place`.
    """
    for override in overrides:
        require("=" in override, f"override {override!r} is not of the form section.key=value")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(kind),
            *(OmegaConf.create(_kept(tree, trees[number:])) for number, tree in enumerate(trees, 1)),
            OmegaConf.from_dotlist(list(overrides)),
        )
        missing = sorted(OmegaConf.missing_keys(merged))
        require(
            not missing,
            f"{place}: no value for {' and '.join(missing)}; set each in the file or on the command line (key=value)",
        )
        made = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        if "incompatible container" in str(error):
            raise ConfigError(
                f"{place}: an override such as rewards.0.weight=2 cannot reach into a list; give the whole list: "
                "'rewards=[{name: ..., use: ...}]'"
            ) from error
        lines = [line for line in str(error).splitlines() if not line.strip().startswith(("reference_type", "object_"))]
        raise ConfigError(f"{place}: " + " ".join(line.strip() for line in lines)) from error
    assert isinstance(made, kind)
    return made


def _kept(tree: Mapping[str, Any], later: Sequence[Any]) -> dict[str, Any]:
    """The tree without the options of those plug-ins in whose place a later tree has another one."""
    over = [other for other in later if isinstance(other, Mapping)]
    replaced = "use" in tree and any(other.get("use", tree["use"]) != tree["use"] for other in over)
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "options" and replaced:
            continue
        inner = [other[key] for other in over if key in other]
        found[key] = _kept(value, inner) if isinstance(value, Mapping) else value
    return found


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would drop the first one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in first and key.value != "<<":
                raise ConfigError(
                    f"`{key.value}` stands twice, in line {first[key.value]} and in line {line}; keep one"
                )
            first[key.value] = line
        return super().construct_mapping(node, deep)


def read_tree(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, unchecked, but for keys that stand twice.

    Raises:
        ConfigError: it is missing or malformed.
    """
    try:
        tree = yaml.load(Path(path).read_text(), _StrictLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration at {path}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `section: ...` lines, got {type(tree).__name__}")
    return tree


def flatten(config: Any) -> dict[str, Any]:
    """All leaves of a configuration as dotted keys."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    leaves: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and node:
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        elif isinstance(node, list) and node and isinstance(node[0], Mapping):
            for index, value in enumerate(node):
                walk(f"{prefix}.{index}", value)
        else:
            leaves[prefix] = node

    walk("", container)
    return leaves


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """For every dotted key that was set, the file and line or the override that set it; the others are defaults."""
    found: dict[str, str] = {}

    def walk(prefix: str, node: yaml.Node, origin: str | None = None) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for key, value in node.value:
                walk(f"{prefix}.{key.value}" if prefix else key.value, value, origin)
        elif isinstance(node, yaml.SequenceNode) and node.value and isinstance(node.value[0], yaml.MappingNode):
            for index, value in enumerate(node.value):
                walk(f"{prefix}.{index}", value, origin)
        else:
            found[prefix] = origin or f"{path}:{node.start_mark.line + 1}"

    root = yaml.compose(Path(path).read_text())
    if root is not None:
        walk("", root)
    for override in overrides:
        key, _, text = override.partition("=")
        set_to = yaml.compose(text)
        if set_to is None:  # nothing stands behind the `=`
            found[key] = "command line"
        else:
            walk(key, set_to, "command line")
    return found


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
