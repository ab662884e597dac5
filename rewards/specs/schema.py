"""A grader of structure: JSON, and the arguments of tool calls, held against JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from rlsys.interfaces import RewardResult
from rlsys.rewards.specs.services import Services
from rlsys.rewards.specs.spec import Spec
from rlsys.rewards.specs.template import Template
from rlsys.rewards.specs.values import Values, strict_json

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_DATA = ("const", "enum", "default", "examples")  # what looks like a reference inside these is a value


class JsonSchemaGrader:
    """Passes where the text `input` (by default all that the response says) is JSON that its `schema` allows.

    With `tool_calls`, schemas by tool name, it also takes at least one tool call, and every call must name one of the
    tools and have arguments that its schema allows. Either of the two may be left out.

    JSON that is not strict (a key twice, NaN), long or deep is wrong. Validation runs in a worker process that is
    killed at its deadline, so that no regular expression or recursion of a schema can hang on a hostile text. A schema
    is checked at once; a reference out of it is refused, and nothing is ever fetched.
    """

    absent = RewardResult(score=0.0, status="wrong")

    def __init__(self, spec: Spec, services: Services) -> None:
        spec.check_keys((), ("input", "schema", "tool_calls"))
        self._services = services
        if "schema" not in spec.fields and not spec.mapping("tool_calls"):
            raise spec.wrong("schema", "must be given, or `tool_calls`, schemas by tool name")
        if "input" in spec.fields and "schema" not in spec.fields:
            raise spec.wrong("input", "is compared with a `schema`, which is missing")
        self._schema = _checked(spec, "schema", spec.fields["schema"]) if "schema" in spec.fields else None
        self._tools = {
            name: _checked(spec, f"tool_calls.{name}", schema) for name, schema in spec.mapping("tool_calls").items()
        }
        place = f"{spec.place}.input"
        self._input = spec.template("input") if "input" in spec.fields else Template(_ALL, place=place)

    async def grade(self, values: Values) -> RewardResult:
        """Validate everything in one request to a worker process."""
        pairs = [] if self._schema is None else [(self._schema, self._input.render(values))]
        if self._tools:
            calls = [call["function"] for call in values["sample"]["output_tools"]]
            if not calls or any(call["name"] not in self._tools for call in calls):
                return self.absent
            pairs += [(self._tools[call["name"]], call["arguments"]) for call in calls]
        try:
            for _, text in pairs:
                strict_json(text)
        except ValueError:
            return self.absent
        answer = await self._services.ask({"kind": "schema", "pairs": json.dumps(pairs)})
        return RewardResult(score=1.0, status="correct") if answer == "correct" else self.absent


_ALL = "{{ sample.output_text }}"


def _checked(spec: Spec, key: str, schema: Any) -> str:
    """The schema as JSON; ConfigError where it is none or cannot work."""
    if not isinstance(schema, Mapping):
        raise spec.wrong(key, f"a JSON schema is a mapping, got {schema!r:.60}")
    try:
        text = json.dumps(schema)
        plain = json.loads(text)
        kind = validator_for(plain, default=Draft202012Validator)
        kind.check_schema(plain)
        _check_references(spec, key, plain)
        for trivial in ("null", "0", '""', "[]", "{}"):
            kind(plain, registry=Registry()).is_valid(json.loads(trivial))
    except SchemaError as error:
        raise spec.wrong(key, f"is no JSON schema: {error.message:.300}") from error
    except RecursionError as error:
        raise spec.wrong(key, "refers to itself without an end") from error
    except Unresolvable as error:
        raise spec.wrong(key, f"has a reference to what it does not contain: {error.ref!r}") from error
    except (TypeError, ValueError) as error:
        raise spec.wrong(key, f"cannot be written as JSON: {error}") from error
    return text


def _check_references(spec: Spec, key: str, schema: Mapping[str, Any]) -> None:
    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    resolver = Registry().resolver_with_root(root)
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise spec.wrong(
                key, f"refers to {reference!r}, but nothing is fetched; put it under `$defs` and write `#/$defs/NAME`"
            )
        resolver.lookup(reference)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in _REFERENCES and isinstance(value, str):
                yield value
            elif key not in _DATA:
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)
