"""The arguments of a tool call held against the tool's JSON schema, with complaints that a policy can learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from rlsys.errors import ConfigError

MAX_COMPLAINTS = 5
MAX_VALUE_CHARACTERS = 80


class ArgumentChecker:
    """Checks calls of one tool. References are resolved inside its schema only: nothing is fetched.

    Raises:
        ConfigError: `parameters` is not a JSON schema.
    """

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        self.name, self.parameters = name, parameters
        kind = validator_for(parameters, default=Draft202012Validator)
        try:
            kind.check_schema(parameters)
        except SchemaError as error:
            raise ConfigError(f"the tool {name!r} has `parameters` that are no JSON schema: {error.message}") from error
        self._validator = kind(parameters, registry=Registry())

    def complaint(self, arguments: Mapping[str, Any]) -> str | None:
        """What is wrong with the arguments and which there are; None where they fit."""
        try:
            errors = list(self._validator.iter_errors(arguments))
        except Unresolvable:  # a reference to elsewhere: left to the tool
            return None
        if not errors:
            return None
        found = [
            _complaint(best_match([error])) for error in sorted(errors, key=lambda error: list(map(str, error.path)))
        ]
        return wrong_arguments(self.name, found, self.parameters)


def wrong_arguments(name: str, complaints: list[str], parameters: Mapping[str, Any]) -> str:
    """The text that answers a call with wrong arguments."""
    return f"Wrong arguments for {name!r}: {'; '.join(complaints[:MAX_COMPLAINTS])}. {_expected(parameters)}"


def _complaint(error: Any) -> str:
    place = ".".join(map(str, error.absolute_path))
    message = error.message
    if len(message) > 2 * MAX_VALUE_CHARACTERS:  # it begins with the value, which may be a whole program
        message = f"{message[:MAX_VALUE_CHARACTERS]} ... {message[-MAX_VALUE_CHARACTERS:]}"
    return f"{place}: {message}" if place else str(message)


def _expected(parameters: Mapping[str, Any]) -> str:
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        return "It takes no arguments." if parameters.get("additionalProperties") is False else ""
    required, definitions = parameters.get("required", ()), parameters.get("$defs", {})
    listed = [
        f"{name} ({_kind(schema, definitions)}{'' if name in required else ', optional'})"
        for name, schema in properties.items()
    ]
    return f"Expected: {', '.join(listed)}."


def _kind(schema: Any, definitions: Mapping[str, Any]) -> str:
    """A property's type in a few words."""
    if not isinstance(schema, Mapping):
        return "anything"
    if "$ref" in schema:
        name = str(schema["$ref"]).rpartition("/")[2]
        return _kind(definitions[name], {}) if "enum" in definitions.get(name, {}) else name
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_kind(option, definitions) for option in schema[several])
    kind = schema.get("type", "anything")
    if kind == "array" and "items" in schema:
        return f"array of {_kind(schema['items'], definitions)}"
    return kind if isinstance(kind, str) else " or ".join(map(str, kind))
