"""One grader's spec, as it stands in YAML or JSON: a mapping whose mistakes are found before anything is graded."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.errors import ConfigError
from rlsys.rewards.specs.template import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The fields of one grader and `place`, where they stand, for messages. Every method raises ConfigError."""

    fields: Mapping[str, Any]
    place: str

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise ConfigError(f"{self.place}: a grader's spec is a mapping, got {_kind(self.fields)}")

    def wrong(self, key: str, message: str) -> ConfigError:
        """The error about one field."""
        return ConfigError(f"{self.place}.{key}: {message}")

    def check_keys(self, required: Collection[str], optional: Collection[str]) -> None:
        """All required keys and no unknown ones; `type` and `name` may always stand there."""
        known = ["type", "name", *required, *optional]
        for key in self.fields:
            if key not in known:
                raise ConfigError(f"{self.place}: unknown key {key!r}; {nearest(key, known)}")
        if missing := [key for key in required if key not in self.fields]:
            raise ConfigError(f"{self.place}: {', '.join(missing)} must be given for a grader of this type")
        if not isinstance(self.fields.get("name", ""), str):
            raise self.wrong("name", f"a name is a text, got {_kind(self.fields['name'])}")

    def text(self, key: str) -> str:
        """A field that is a text."""
        if not isinstance(value := self.fields[key], str):
            raise self.wrong(key, f"must be a text, got {_kind(value)}; quote it, as YAML reads {{{{ }}}} as a mapping")
        return value

    def template(self, key: str) -> Template:
        """A field that is a template."""
        return Template(self.text(key), place=f"{self.place}.{key}")

    def choice(self, key: str, known: Collection[str]) -> str:
        """A field that is one of these words."""
        if (word := self.text(key)) not in known:
            raise self.wrong(key, f"unknown {word!r}; {nearest(word, known)}")
        return word

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A field that is a mapping with texts as keys; empty where it is not there."""
        value = self.fields.get(key, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, f"must be a mapping, got {_kind(value)}")
        return value

    def threshold(self, low: float = 0.0, high: float = 1.0) -> float | None:
        """`pass_threshold`, from which on a grade is a pass."""
        value = self.fields.get("pass_threshold")
        if value is None:
            return None
        if not is_number(value) or not low <= value <= high:
            raise self.wrong("pass_threshold", f"must be a number from {low:g} to {high:g}, got {value!r}")
        return float(value)


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def nearest(word: Any, known: Collection[str]) -> str:
    """The hint at the end of a message about an unknown word."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__} ({value!r:.60})"
