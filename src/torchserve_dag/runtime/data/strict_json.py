"""JSON that clients send, parsed strictly: whatever a parser could guess at is refused."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100
"""How deep lists and objects may be nested. Python's own functions fail, or recurse, at depths that vary."""


def parse(text: str) -> Any:
    """The data of a JSON text.

    Raises ValueError for what is not JSON; and for numbers that are not finite, keys that an object has twice (Python
    would take the last), surrogates without their partner (which no answer could contain), and deep nesting.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise _too_deep() from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(data):
        raise _too_deep()
    if "\\u" in text:
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for value in level:
            inside += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        level = [value for value in inside if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{json.dumps(twice[:40])} is written twice in one object")
    return data


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
