"""Python functions as tools of a model: what the model is told of them, and their calls.

    def weekday(day: Annotated[str, "like 2026-11-27"]) -> str:
        '''The day of the week of a date.'''

`tool_of(weekday)` has its name, its docstring, and a JSON Schema of its parameters, made from their types.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import logging
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import plain, strict_json
from torchserve_dag.runtime.messages import ChatMessage, FunctionTool, InputError, Tool, ToolCall

logger = logging.getLogger(__name__)

MOST_RESULT = 16_000
"""Characters of a result that the model is told."""
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", None: "null", type(None): "null"}


def tool_of(function: Callable[..., Any]) -> Tool:
    """What a model is told of a function. Raises TypeError for one that no model can call.

    Types of parameters are str, int, float, bool, None, Literal, enumerations, lists, dicts with keys of text, message
    classes, and unions of these. A text in `Annotated` describes a parameter.
    """
    name, properties = function.__name__, {}
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    if not (description := inspect.getdoc(function)):
        raise TypeError(f"{name} has no docstring, by which a model decides when to call it")
    for parameter in parameters.values():
        if parameter.kind not in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
            raise TypeError(f"{name}: the parameter {parameter.name} cannot be given by its name")
        if parameter.name not in hints:
            raise TypeError(f"{name}: the parameter {parameter.name} has no type")
        try:
            properties[parameter.name] = _schema(hints[parameter.name])
        except TypeError as error:
            raise TypeError(f"{name}: the parameter {parameter.name}: {error}") from None
    return Tool(FunctionTool(name, description, _object(properties, _needed(function))))


def call_tool(functions: Sequence[Callable[..., Any]], call: ToolCall) -> ChatMessage:
    """Call the function that a model wants to have called, and return its result as the message that the model gets.

    A call that does not fit the function, and a function that raises, are such a message too: one sentence, by which
    the model can try again. It has the text of an InputError, and nothing of any other exception, which is logged.
    """
    try:
        content = _result(functions, call)
    except InputError as error:
        content = failed_call(error.message)
    return ChatMessage("tool", content, tool_call_id=call.id)


def failed_call(sentence: str) -> str:
    """What a model is told in place of a result."""
    return f"Error: {sentence}"


def _result(functions: Sequence[Callable[..., Any]], call: ToolCall) -> str:
    name, known = call.function.name or "", {function.__name__: function for function in functions}
    if name not in known:
        raise InputError(f"There is no tool {name[:60]!r}; {plain.did_you_mean(name[:60], list(known))}")
    given = _arguments(known[name], call.function.arguments or "{}")
    try:
        value = known[name](**given)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever the function raises, the model is told)
        logs.report(logger, error, f"the tool {name} raised")
        raise InputError(f"{name} failed ({type(error).__name__}).") from None
    try:
        text = value if isinstance(value, str) else plain.to_json(value).decode()
    except plain.UnwritableError as error:
        raise InputError(f"{name} failed: {error}.") from None
    more = len(text) - MOST_RESULT
    return text if more <= 0 else f"{text[:MOST_RESULT]} … and {more:,} characters more"


def _arguments(function: Callable[..., Any], text: str) -> dict[str, Any]:
    """The arguments of a call. Raises InputError, which names the first that does not fit."""
    name = function.__name__
    try:
        data = strict_json.parse(text)
    except ValueError as error:
        raise InputError(f"The arguments of {name} are not JSON: {error}.") from None
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    if not isinstance(data, dict):
        raise InputError(f"The arguments of {name} are a JSON object with {', '.join(parameters) or 'no keys'}.")
    if unknown := sorted(data.keys() - parameters.keys()):
        hint = plain.did_you_mean(unknown[0][:60], list(parameters))
        raise InputError(f"{name} has no parameter {unknown[0][:60]!r}; {hint or 'it has none'}.")
    if missing := [one for one in _needed(function) if one not in data]:
        raise InputError(f"{name} needs {' and '.join(missing)}.")
    arguments = {}
    for key, value in data.items():
        try:
            arguments[key] = plain.build(hints[key], value)
        except plain.WrongDataError as error:
            first = error.wrongs[0]
            raise InputError(f"{name}: {plain.dotted((key, *first.path))}: {first.what}.") from None
    return arguments


def _needed(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def _schema(kind: Any, outer: frozenset[Any] = frozenset()) -> dict[str, Any]:  # noqa: PLR0911 (one return a kind)
    """A type as JSON Schema. `outer`: the dataclasses around it. Raises TypeError."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        texts = [text for text in parts[1:] if isinstance(text, str)]
        return _schema(parts[0], outer) | ({"description": texts[0]} if texts else {})
    if kind is Any:
        return {}
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in {typing.Union, types.UnionType}:
        return {"anyOf": [_schema(part, outer) for part in parts]}
    if origin is list:
        return {"type": "array", "items": _schema(parts[0], outer)}
    if origin is dict and parts[0] is str:
        return {"type": "object", "additionalProperties": _schema(parts[1], outer)}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and plain.fits_json(kind) and kind not in outer:
        fields = plain.field_types(kind)
        properties = {name: _schema(field, outer | {kind}) for name, field in fields.items()}
        return _object(properties, plain.missing(kind, ()))
    raise TypeError(f"no model can write a {plain.name_of(kind)}")


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
