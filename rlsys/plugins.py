"""References such as `my_pkg.reward:LengthAware`, resolved and built before anything starts."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlsys.errors import ConfigError


def resolve(reference: str, *, place: str) -> Any:
    """Return the object that `module:object` names.

    `place` is the config key it stands under, for the message.

    Raises:
        ConfigError: the module or the object does not exist; names the nearest one that does.
    """
    if ":" not in reference:
        raise ConfigError(f"{place}: {reference!r} is not a reference; write it as `module:object`")
    module_name, _, object_name = reference.partition(":")
    try:
        return pkgutil.resolve_name(reference)
    except ValueError as error:
        raise ConfigError(f"{place}: {reference!r} is not a reference; write it as `module:object`") from error
    except ImportError as error:
        raise ConfigError(f"{place}: cannot import {module_name!r} of {reference!r}: {error}") from error
    except AttributeError as error:
        module = pkgutil.resolve_name(module_name)
        near = difflib.get_close_matches(object_name, dir(module), n=1)
        hint = f"; did you mean `{module_name}:{near[0]}`?" if near else ""
        raise ConfigError(f"{place}: {module_name!r} has no {object_name!r}{hint}") from error


def check_options(target: Callable[..., Any], options: Mapping[str, Any], *, place: str, given: int = 0) -> None:
    """Check that `target(*given positional arguments, **options)` is a valid call, without making it.

    Raises:
        ConfigError: an option is unknown (names the nearest) or a required one is missing.
    """
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = list(parameters)[given:]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known) or 'none'}"
            raise ConfigError(f"{place}.options: unknown option {name!r}; {hint}")
    missing = [
        name
        for name in known
        if parameters[name].default is inspect.Parameter.empty
        and parameters[name].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and name not in options
    ]
    if missing:
        raise ConfigError(f"{place}.options: {', '.join(missing)} must be given")


def build(reference: str, options: Mapping[str, Any], *, place: str) -> Any:
    """Resolve a class and make an instance; a plain function without options is returned as it is."""
    target = resolve(reference, place=place)
    if not inspect.isclass(target):
        if options:
            raise ConfigError(f"{place}: {reference!r} is a function and takes no options; make it a class")
        return target
    check_options(target, options, place=place)
    return target(**options)


def isolation_of(tools: Iterable[Any]) -> dict[str, str]:
    """How well each of these tools isolates what it runs, of those that say so (`tier`), by name."""
    return {tool.name: tool.tier for tool in tools if getattr(tool, "tier", None) is not None}


async def run_hook(plug_in: Any, name: str) -> None:
    """Call the plug-in's method of this name where it has one, and await what can be awaited."""
    hook = getattr(plug_in, name, None)
    if hook is not None and inspect.isawaitable(result := hook()):
        await result
