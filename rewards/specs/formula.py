"""A formula over scores, such as `0.3 * style + 0.7 * right`: arithmetic and nothing else."""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Collection, Mapping

from rlsys.errors import ConfigError

MAX_FORMULA_CHARACTERS = 2000
FUNCTIONS: Mapping[str, Callable[..., float]] = {"min": min, "max": max}
_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Formula:
    """An expression of numbers, `names`, + - * /, parentheses, `min(...)` and `max(...)`; it is never executed as code.

    Raises ConfigError for anything else; names the part.
    """

    def __init__(self, source: str, names: Collection[str], *, place: str) -> None:
        self._place, self._names = place, names
        if len(source) > MAX_FORMULA_CHARACTERS:
            raise ConfigError(f"{place}: a formula of {len(source)} characters; the limit is {MAX_FORMULA_CHARACTERS}")
        try:
            self._tree = ast.parse(source.strip(), mode="eval").body
            self._check(self._tree)
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{place}: {source!r} is not a formula ({error})") from error

    def value(self, scores: Mapping[str, float]) -> float:
        """The formula's value; ZeroDivisionError and infinities are the caller's to judge."""
        return self._value(self._tree, scores)

    def _value(self, node: ast.expr, scores: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name):
                return scores[name]
            case ast.UnaryOp():
                return _UNARY[type(node.op)](self._value(node.operand, scores))
            case ast.BinOp():
                return _BINARY[type(node.op)](self._value(node.left, scores), self._value(node.right, scores))
            case ast.Call(func=ast.Name(id=name)):
                return FUNCTIONS[name](*(self._value(argument, scores) for argument in node.args))
        raise AssertionError(f"unchecked {ast.dump(node)}")

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=bool()):
                raise ConfigError(f"{self._place}: {node.value!r} is no number")
            case ast.Constant(value=int() | float() as number) if math.isfinite(float(number)):
                return
            case ast.Name(id=name):
                self._check_name(name)
            case ast.UnaryOp() if type(node.op) in _UNARY:
                self._check(node.operand)
            case ast.BinOp() if type(node.op) in _BINARY:
                self._check(node.left)
                self._check(node.right)
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS and len(node.args) > 1:
                for argument in node.args:
                    self._check(argument)
            case _:
                raise ConfigError(
                    f"{self._place}: {ast.unparse(node)!r} is not allowed in a formula; it may have numbers, the names "
                    f"of graders, + - * /, parentheses, and min and max of two or more values"
                )

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            near = difflib.get_close_matches(name, self._names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self._names)}"
            raise ConfigError(f"{self._place}: unknown name {name!r}; {hint}")
