"""The small language of `each`, `when`, `input` and `inputs`: paths, comparisons, and, or, not, len.

    detect.objects        item.score >= 0.3        len(detect.objects) > 0 and parameters.names == "yes"

An expression is parsed and typed when the workflow is checked; nothing is ever passed to `eval`.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.types import fits, without
from torchserve_dag.runtime.messages import Skipped

Values = Mapping[str, Any]
Evaluate = Callable[[Values], Any]


class ExpressionError(Exception):
    """An expression that is refused: what is wrong, and what to write instead."""

    def __init__(self, what: str, help: str = "") -> None:  # noqa: A002 (the word that is printed)
        super().__init__(what)
        self.what = what
        self.help = help


@dataclass(frozen=True, slots=True)
class Expression:
    text: str
    type: Any
    names: frozenset[str]
    """The names that it reads: nodes, `request`, `item`, `parameters`."""
    evaluate: Evaluate


_COMPARE: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], bool]]] = {
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
}
_MAX_LENGTH, _MAX_DEPTH = 1_000, 30
_GRAMMAR = "write paths like detect.objects, comparisons, and, or, not, len(...)"


def names_in(text: str) -> frozenset[str]:
    """The names that an expression begins its paths with. Raises ExpressionError."""
    nodes = list(ast.walk(_parse(text)))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name) and node not in called)


def compile_expression(text: str, scope: Mapping[str, Any]) -> Expression:
    """`text` as an expression over `scope` (name → type). Raises ExpressionError."""
    try:
        kind, evaluate = _compile(_parse(text), scope)
    except ValueError:  # ast.unparse cannot write every f-string into the message
        raise ExpressionError(f'"{text}" is not an expression', _GRAMMAR) from None
    return Expression(text, kind, names_in(text), evaluate)


def _parse(text: str) -> ast.expr:
    if len(text) > _MAX_LENGTH:
        what = f'"{text[:50]}…" has {len(text):,} characters; the limit is {_MAX_LENGTH:,}'
        raise ExpressionError(what, "do more in a function node")
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError(f'"{text[:200]}" is not an expression', _GRAMMAR) from None
    level: list[ast.AST] = [parsed]
    for _ in range(_MAX_DEPTH):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    if level:
        raise ExpressionError(f'"{text[:50]}…" is nested too deeply', "do more in a function node")
    return parsed


def _compile(node: ast.expr, scope: Mapping[str, Any]) -> tuple[Any, Evaluate]:  # noqa: C901, PLR0911 (one return a form)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str):
        constant = node.value
        return type(constant), lambda _: constant
    if isinstance(node, ast.Name):
        return _name(node, scope)
    if isinstance(node, ast.Attribute):
        return _attribute(node, scope)
    if isinstance(node, ast.Compare):
        return _compare(node, scope)
    if isinstance(node, ast.BoolOp):
        parts = [_truth(part, scope) for part in node.values]
        if isinstance(node.op, ast.And):
            return bool, lambda values: all(part(values) for part in parts)
        return bool, lambda values: any(part(values) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        part = _truth(node.operand, scope)
        return bool, lambda values: not part(values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        kind, number = _compile(node.operand, scope)
        if not fits(kind, float):
            raise ExpressionError(f'"{ast.unparse(node)}": minus needs a number, not {plain.name_of(kind)}')
        return kind, lambda values: -number(values)
    if isinstance(node, ast.Call):
        return _len(node, scope)
    raise ExpressionError(f'"{ast.unparse(node)}" is not part of an expression', _GRAMMAR)


def _name(node: ast.Name, scope: Mapping[str, Any]) -> tuple[Any, Evaluate]:
    name = node.id
    if name not in scope:
        raise ExpressionError(f'nothing here is called "{name}"', plain.did_you_mean(name, list(scope)))
    return scope[name], lambda values: values[name]


def _attribute(node: ast.Attribute, scope: Mapping[str, Any]) -> tuple[Any, Evaluate]:
    kind, owner = _compile(node.value, scope)
    name = node.attr
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1] | None, lambda values: owner(values).get(name)
    owner_kind = without(kind, Skipped)
    try:
        known = _attributes(owner_kind)
    except Exception as error:  # noqa: BLE001 (annotations are the user's, and evaluated)
        raise ExpressionError(f"the annotations of {plain.name_of(owner_kind)}: {error}") from None
    if name not in known:
        what = f'{plain.name_of(owner_kind)} (the type of "{ast.unparse(node.value)}") has no "{name}"'
        raise ExpressionError(what, plain.did_you_mean(name, list(known)))

    def read(values: Values) -> Any:
        value = owner(values)
        return value if isinstance(value, Skipped) else getattr(value, name)

    return known[name] if owner_kind is kind else known[name] | Skipped, read


def _attributes(kind: Any) -> dict[str, Any]:
    """A message's fields and annotated properties, with their types."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        return {}
    properties = {
        name: typing.get_type_hints(value.fget).get("return", Any)
        for name, value in vars(kind).items()
        if isinstance(value, property) and value.fget
    }
    return plain.field_types(kind) | properties


def _compare(node: ast.Compare, scope: Mapping[str, Any]) -> tuple[Any, Evaluate]:
    if len(node.ops) != 1 or type(node.ops[0]) not in _COMPARE:
        raise ExpressionError(f'"{ast.unparse(node)}": write one comparison with < <= > >= == !=', "join two with and")
    sign, compare = _COMPARE[type(node.ops[0])]
    (left_type, left), (right_type, right) = _compile(node.left, scope), _compile(node.comparators[0], scope)
    number = fits(left_type, float) and fits(right_type, float)
    ordered = number or (fits(left_type, str) and fits(right_type, str))
    if not ordered and (sign not in {"==", "!="} or not (fits(left_type, right_type) or fits(right_type, left_type))):
        raise ExpressionError(
            f'"{ast.unparse(node)}" compares {plain.name_of(left_type)} with {plain.name_of(right_type)}'
        )
    return bool, lambda values: compare(left(values), right(values))


def _truth(node: ast.expr, scope: Mapping[str, Any]) -> Evaluate:
    kind, evaluate = _compile(node, scope)
    if kind is not bool:
        raise ExpressionError(f'"{ast.unparse(node)}" is {plain.name_of(kind)}, where true or false is meant')
    return evaluate


def _len(node: ast.Call, scope: Mapping[str, Any]) -> tuple[Any, Evaluate]:
    if not (isinstance(node.func, ast.Name) and node.func.id == "len" and len(node.args) == 1 and not node.keywords):
        raise ExpressionError(f'"{ast.unparse(node)}": the only function here is len', "do more in a function node")
    kind, evaluate = _compile(node.args[0], scope)
    if (typing.get_origin(kind) or kind) not in {list, str, dict}:
        raise ExpressionError(f'"{ast.unparse(node)}": {plain.name_of(kind)} has no length')
    return int, lambda values: len(evaluate(values))
