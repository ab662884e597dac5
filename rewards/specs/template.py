"""Templates such as `{{ item.reference_answer }}`: written by whoever configures the run, filled with plain values.

What is filled in is never read as a template, and an expression reaches nothing but JSON values: no attribute or
method of a Python object, no global name, no statement, no other template.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import ChainableUndefined, StrictUndefined, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlsys.errors import ConfigError
from rlsys.rewards.specs.values import AbsentError, GradingError, Values, plain

NAMESPACES = ("item", "sample")
SAMPLE_FIELDS = ("output_text", "output_json", "output_tools")
MAX_RENDERED_CHARACTERS = 50_000_000  # a template that repeats a long response is a mistake, not a crash


class Template:
    """A text with `{{ ... }}` expressions over `item` and `sample`.

    `reads` says which of the two it uses. Raises ConfigError for wrong syntax, a statement (`{% ... %}`), an unknown
    name or an unknown field of `sample`.
    """

    def __init__(self, source: str, *, place: str) -> None:
        self.place = place
        try:
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{place}: wrong template syntax in {source!r}: {error.message}") from error
        _check(tree, place)
        self.reads = frozenset(meta.find_undeclared_variables(tree))

    def render(self, values: Values) -> str:
        """The text with its values.

        Raises AbsentError where the response has no such value, GradingError where the problem has none.
        """
        try:
            return self._fill(values)
        except Exception as error:  # a filter may fail in any way at a value that it was not made for
            message = f"{self.place}: {error}"
            if "sample" in self.reads and ("item" not in self.reads or self._works_without_sample(values)):
                raise AbsentError(message) from error
            raise GradingError(f"{message} (problem {values['item'].get('id')!r})") from error

    def _fill(self, values: Values) -> str:
        parts, length = [], 0
        for part in self._template.generate(item=values["item"], sample=values["sample"]):
            parts.append(part)
            length += len(part)
            if length > MAX_RENDERED_CHARACTERS:
                raise ValueError(f"the filled template has more than {MAX_RENDERED_CHARACTERS} characters")
        return "".join(parts)

    def _works_without_sample(self, values: Values) -> bool:
        """Whether it is the response that lacks a value, because the problem lacks none."""
        try:
            self._fill({"item": values["item"], "sample": _Anything(name="sample")})
        except Exception:  # as above
            return False
        return True


class _Anything(ChainableUndefined):
    """Stands for a response that has every field."""


class _DataEnvironment(ImmutableSandboxedEnvironment):
    """Reads mappings and lists and nothing else, so that `item.values` is a key of the data and not a method."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, _Anything):
            return obj
        if isinstance(obj, Mapping) and argument in obj:
            return obj[argument]
        if isinstance(obj, list | tuple) and isinstance(argument, int) and -len(obj) <= argument < len(obj):
            return obj[argument]
        return self.undefined(obj=obj, name=argument)


def _shown(value: Any) -> str:
    """Texts as they are, other values as JSON; null is no value."""
    if isinstance(value, _Anything):
        return ""
    if isinstance(value, str | Undefined):
        return str(value)  # raises where it is undefined
    if value is None:
        raise UndefinedError("the value is null")
    return json.dumps(value, ensure_ascii=False, default=plain)


_ENVIRONMENT = _DataEnvironment(undefined=StrictUndefined, finalize=_shown, keep_trailing_newline=True)
_ENVIRONMENT.globals.clear()


def _check(tree: nodes.Template, place: str) -> None:
    for node in tree.body:
        if not isinstance(node, nodes.Output):
            raise ConfigError(f"{place}: a grader's template has {{{{ ... }}}} expressions only, no {{% ... %}}")
    for name in sorted(meta.find_undeclared_variables(tree) - set(NAMESPACES)):
        raise ConfigError(f"{place}: unknown name {name!r} in a template; write `item.{name}` or `sample.output_text`")
    accesses: list[Any] = [*tree.find_all(nodes.Getattr), *tree.find_all(nodes.Getitem)]
    for access in accesses:
        if not isinstance(access.node, nodes.Name) or access.node.name != "sample":
            continue
        field = access.attr if isinstance(access, nodes.Getattr) else getattr(access.arg, "value", None)
        if isinstance(field, str) and field not in SAMPLE_FIELDS:
            near = difflib.get_close_matches(field, SAMPLE_FIELDS, n=1)
            hint = f"did you mean `sample.{near[0]}`?" if near else f"known: {', '.join(SAMPLE_FIELDS)}"
            raise ConfigError(f"{place}: `sample` has no {field!r}; {hint}")
