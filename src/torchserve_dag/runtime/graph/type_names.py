"""Types as a workflow's file writes them: `Photo`, `list[Label]`, `Text | Skipped`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torchserve_dag.runtime import messages
from torchserve_dag.runtime.data import plain

_PLAIN: Mapping[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "bytes": bytes, "anything": Any}


def known_types(module: ModuleType | None) -> dict[str, Any]:
    """The types that a file may name: Python's plain types, the messages, and the dataclasses of `module`."""
    known = dict(_PLAIN)
    for source in filter(None, (messages, module)):
        known |= {n: v for n, v in vars(source).items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    return known


def type_named(text: str, known: Mapping[str, Any]) -> Any:
    """The type that `text` names. Raises ValueError with the reason if it names none."""
    try:
        return _type(ast.parse(text.strip(), mode="eval").body, known)
    except (SyntaxError, RecursionError):
        raise ValueError(f'"{text[:80]}" is not a type; write one like Photo or list[Label]') from None


def _type(node: ast.expr, known: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.Name):
        if node.id not in known:
            raise ValueError(f'there is no type "{node.id}"; {plain.did_you_mean(node.id, list(known))}')
        return known[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _type(node.left, known) | _type(node.right, known)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "list":
            return list[_type(node.slice, known)]  # type: ignore[misc]
        if node.value.id == "dict" and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:  # noqa: PLR2004
            key, value = (_type(part, known) for part in node.slice.elts)
            return dict[key, value]  # type: ignore[valid-type]
    raise ValueError(f'"{ast.unparse(node)}" is not a type; write one like Photo or list[Label]')
