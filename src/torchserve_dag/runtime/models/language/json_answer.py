"""A model's answer as JSON that fits a schema: read strictly, validated, and refused with its place and reason.

It validates what `check_schema(…, validated=True)` accepts. That is less than JSON Schema has, so that the work is
bounded, whatever a client's schema and a model's answer are: there are no patterns, and steps are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime.data import plain, strict_json
from torchserve_dag.runtime.data.plain import Wrong
from torchserve_dag.runtime.messages import InputError
from torchserve_dag.runtime.models.language.json_schema import resolve

MOST_STEPS = 100_000
"""Comparisons of a value with a schema, or of two values. A schema whose references branch could need any number."""
_TOO_MUCH = f"The answer is not compared with the schema in {MOST_STEPS:,} steps: make the schema simpler."
MOST_KEY = 40
"""Characters of a key that a sentence repeats."""


class UnfitAnswerError(InputError):
    """A model's answer is not the JSON that was asked for: 422."""

    type = "UnfitAnswer"

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.UNPROCESSABLE_ENTITY)


def read_json_answer(text: str, schema: Mapping[str, Any]) -> Any:
    """The data of an answer. Raises UnfitAnswerError, which says where it does not fit the schema, and why.

    `schema`: one that `check_schema(schema, validated=True)` accepts.
    """
    try:
        data = strict_json.parse(text)
    except ValueError as error:
        raise UnfitAnswerError(f"The answer is not JSON: {error}.") from None
    try:
        wrong = next(_Validation(schema).wrongs(schema, data, ()), None)
    except RecursionError:
        raise UnfitAnswerError(_TOO_MUCH) from None
    if wrong:
        where = plain.dotted(tuple(str(part)[:MOST_KEY] if isinstance(part, str) else part for part in wrong.path))
        raise UnfitAnswerError(f"The answer does not fit the schema: {where or 'as a whole'}: {wrong.what}.")
    return data


class _Validation:
    """One answer against one schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0
        self._enums: dict[int, frozenset[Any]] = {}

    def wrongs(self, schema: Any, value: Any, path: plain.Path) -> Iterator[Wrong]:
        """What does not fit, beginning with what is told."""
        self._step()
        if isinstance(schema, bool):
            if not schema:
                yield Wrong(path, "nothing may stand here")
            return
        yield from self._value(schema, value, path)
        if isinstance(value, dict):
            yield from self._object(schema, value, path)
        elif isinstance(value, list):
            yield from self._array(schema, value, path)
        elif isinstance(value, str):
            yield from _string(schema, value, path)
        elif not isinstance(value, bool) and value is not None:
            yield from _number(schema, value, path)
        yield from self._branches(schema, value, path)

    def _value(self, schema: Mapping[str, Any], value: Any, path: plain.Path) -> Iterator[Wrong]:
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if kinds and not any(_is(kind, value) for kind in kinds):
            yield Wrong(path, f"it is of the type {_type_of(value)}, not {' or '.join(kinds)}")
        if "enum" in schema and self._comparable(value) not in self._enum(schema):
            yield Wrong(path, f"it is none of the {len(schema['enum'])} values that it may have")
        if "const" in schema and self._comparable(value) != self._comparable(schema["const"]):
            yield Wrong(path, "it is not the one value that it may have")

    def _object(self, schema: Mapping[str, Any], value: dict[str, Any], path: plain.Path) -> Iterator[Wrong]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        missing = (name for name in schema.get("required", ()) if name not in value)
        yield from (Wrong(path, f'"{name[:MOST_KEY]}" is missing') for name in missing)
        for key, part in value.items():
            if key in properties:
                yield from self.wrongs(properties[key], part, (*path, key))
            elif others is False:
                yield Wrong(path, f'there is no key "{key[:MOST_KEY]}" in the schema')
            else:
                yield from self.wrongs(others, part, (*path, key))
        yield from _count("Properties", "keys", schema, len(value), path)

    def _array(self, schema: Mapping[str, Any], value: list[Any], path: plain.Path) -> Iterator[Wrong]:
        for index, part in enumerate(value):
            yield from self.wrongs(schema.get("items", True), part, (*path, index))
        if schema.get("uniqueItems") and len({self._comparable(part) for part in value}) < len(value):
            yield Wrong(path, "it has a value twice")
        yield from _count("Items", "items", schema, len(value), path)

    def _branches(self, schema: Mapping[str, Any], value: Any, path: plain.Path) -> Iterator[Wrong]:
        references = [resolve(schema["$ref"], self._root)] if "$ref" in schema else []
        for branch in (*schema.get("allOf", ()), *references):
            yield from self.wrongs(branch, value, path)
        for name in ("anyOf", "oneOf"):
            if name not in schema:
                continue
            firsts = [next(self.wrongs(branch, value, path), None) for branch in schema[name]]
            fitting = firsts.count(None)
            if not fitting:
                deepest = max((first for first in firsts if first), key=lambda first: len(first.path))
                nothing = Wrong(path, f"it fits none of the {len(firsts)} forms that it may have")
                yield deepest if len(deepest.path) > len(path) else nothing  # of the form that was meant
            elif fitting > 1 and name == "oneOf":
                yield Wrong(path, f"it fits {fitting} of the forms of which it may have one")

    def _enum(self, schema: Mapping[str, Any]) -> frozenset[Any]:
        if id(schema) not in self._enums:
            self._enums[id(schema)] = frozenset(map(self._comparable, schema["enum"]))
        return self._enums[id(schema)]

    def _comparable(self, value: Any) -> Any:
        """The value as JSON compares it: 1 is 1.0, and is not true; the order of keys says nothing."""
        self._step()
        if isinstance(value, list | tuple):
            return "array", tuple(map(self._comparable, value))
        if isinstance(value, Mapping):
            return "object", frozenset((key, self._comparable(part)) for key, part in value.items())
        return "number" if _is("number", value) else _type_of(value), value

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise UnfitAnswerError(_TOO_MUCH)


def _string(schema: Mapping[str, Any], value: str, path: plain.Path) -> Iterator[Wrong]:
    yield from _count("Length", "characters", schema, len(value), path)
    form = schema.get("format")
    if form and not _FORMATS[form](value):
        yield Wrong(path, f"it is no {form}")


def _number(schema: Mapping[str, Any], value: float, path: plain.Path) -> Iterator[Wrong]:
    if value < schema.get("minimum", value):
        yield Wrong(path, f"it is less than {schema['minimum']}")
    if value > schema.get("maximum", value):
        yield Wrong(path, f"it is more than {schema['maximum']}")
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield Wrong(path, f"it is not more than {schema['exclusiveMinimum']}")
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        yield Wrong(path, f"it is not less than {schema['exclusiveMaximum']}")


def _count(name: str, what: str, schema: Mapping[str, Any], count: int, path: plain.Path) -> Iterator[Wrong]:
    if count < schema.get(f"min{name}", 0):
        yield Wrong(path, f"it has {count} {what}, and needs {schema[f'min{name}']}")
    if count > schema.get(f"max{name}", count):
        yield Wrong(path, f"it has {count} {what}, and may have {schema[f'max{name}']}")


def _is(kind: str, value: Any) -> bool:
    if kind in {"number", "integer"}:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or value == int(value))
    return _type_of(value) == kind


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    names: dict[type, str] = {str: "string", float: "number", list: "array", dict: "object", type(None): "null"}
    return names[type(value)]


_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


def _is_date(text: str) -> bool:
    try:
        return bool(_DATE.fullmatch(text) and date.fromisoformat(text))
    except ValueError:
        return False


def _is_date_time(text: str) -> bool:
    """As RFC 3339 has it, with its offset; without leap seconds."""
    found = _DATE_TIME.fullmatch(text)
    try:
        zone = "+00:00" if found and found[3] in "Zz" else found and found[3]
        return bool(found and datetime.fromisoformat(f"{found[1]}T{found[2]}{zone}"))
    except ValueError:
        return False


def _is_uuid(text: str) -> bool:
    return bool(_UUID.fullmatch(text))


_FORMATS: dict[str, Callable[[str], bool]] = {"date": _is_date, "date-time": _is_date_time, "uuid": _is_uuid}
