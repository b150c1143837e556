"""Random JSON Schemas, a document that fits each, and what a model might write in its place."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema

WORDS = ["name", "size", "a b", "ü", "état", "x/y", "t~", "0", "", "next"]


class SchemaMaker:
    """Makes a schema together with a document that fits it, as far as nothing is said of `oneOf`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._defs: dict[str, Any] = {}

    def make(self) -> tuple[dict[str, Any], Any]:
        schema, document = self._any(0)
        return ({**schema, "$defs": self._defs} if self._defs else schema), document

    def _any(self, depth: int) -> tuple[dict[str, Any], Any]:
        leaves = [self._string, self._integer, self._number, self._constant, self._enum, self._null]
        inner = [self._object, self._object, self._array, self._branches, self._reference, self._list]
        made: Callable[[int], tuple[dict[str, Any], Any]]
        made = (
            self._object
            if depth == 0 and self._chance.random() < 0.5
            else self._chance.choice(leaves if depth > 2 else leaves + inner)
        )
        return made(depth + 1)

    def _string(self, _: int) -> tuple[dict[str, Any], Any]:
        if self._chance.random() < 0.2:
            return {"type": "string", "format": "date"}, "2024-02-29"
        if self._chance.random() < 0.2:
            return {"type": "string", "format": "uuid"}, "12345678-9abc-4def-8123-456789abcdef"
        text = self._chance.choice(["", "a", "Grüße", "😀😀", 'a "quoted" one\n', "0"])
        limits = {
            "minLength": max(0, len(text) - self._chance.randrange(2)),
            "maxLength": len(text) + self._chance.randrange(2),
        }
        return {"type": self._chance.choice(["string", ["string", "null"]]), **self._some(limits)}, text

    def _integer(self, _: int) -> tuple[dict[str, Any], Any]:
        number = self._chance.choice([0, 1, -7, 10**12])
        limits = {"minimum": number, "maximum": number + self._chance.randrange(3)}
        return {"type": "integer", **self._some(limits)}, self._chance.choice([number, float(number)])

    def _number(self, _: int) -> tuple[dict[str, Any], Any]:
        number = self._chance.choice([0.5, -1.25, 3])
        return {
            "type": "number",
            **self._some({"exclusiveMinimum": number - 1, "exclusiveMaximum": number + 0.5}),
        }, number

    def _constant(self, _: int) -> tuple[dict[str, Any], Any]:
        value = self._chance.choice([1, True, "a", {"a": [1, None]}, [], 0.5])
        return {"const": value}, value

    def _enum(self, _: int) -> tuple[dict[str, Any], Any]:
        values = self._chance.sample([1, "1", None, False, [1, 2], {"b": 1}, 2.5], 3)
        return {"enum": values}, self._chance.choice(values)

    def _null(self, _: int) -> tuple[dict[str, Any], Any]:
        return self._chance.choice([({"type": "null"}, None), ({"type": "boolean"}, True), ({}, [1, "a"])])

    def _array(self, depth: int) -> tuple[dict[str, Any], Any]:
        item, value = self._any(depth)
        values = [value] * self._chance.randrange(4)
        limits = {
            "minItems": len(values),
            "maxItems": len(values) + 1,
            **({"uniqueItems": True} if len(values) < 2 else {}),
        }
        return {"type": "array", "items": item, **self._some(limits)}, values

    def _object(self, depth: int) -> tuple[dict[str, Any], Any]:
        made = {name: self._any(depth) for name in self._chance.sample(WORDS, self._chance.randrange(1, 5))}
        required = [name for name in made if self._chance.random() < 0.6]
        document = {name: value for name, (_, value) in made.items() if name in required or self._chance.random() < 0.5}
        others = self._chance.choice([False, False, True, {"type": "integer"}])
        schema = {
            "type": "object",
            "properties": {name: schema for name, (schema, _) in made.items()},
            "required": required,
        }
        limits = {"minProperties": len(document), "maxProperties": len(document) + 1, "additionalProperties": others}
        return schema | self._some(limits), document

    def _branches(self, depth: int) -> tuple[dict[str, Any], Any]:
        (first, document), (second, _) = self._any(depth), self._any(depth)
        return self._chance.choice(
            [{"anyOf": [second, first]}, {"oneOf": [first, second]}, {"allOf": [first, {}]}]
        ), document

    def _reference(self, depth: int) -> tuple[dict[str, Any], Any]:
        schema, document = self._any(depth)
        name = f"d{len(self._defs)}"
        self._defs[name] = schema
        return {"$ref": f"#/$defs/{name}"}, document

    def _list(self, depth: int) -> tuple[dict[str, Any], Any]:
        """A schema that contains itself."""
        schema, value = self._any(depth)
        name = f"l{len(self._defs)}"
        rest = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
        self._defs[name] = {
            "type": "object",
            "properties": {"value": schema, "next": rest},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$ref": f"#/$defs/{name}"}, {"value": value, "next": {"value": value, "next": None}}

    def _some(self, keywords: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in keywords.items() if self._chance.random() < 0.4}


def answer_instead(chance: random.Random, document: Any) -> str:
    """What a model might write where the document is meant; sometimes the document."""
    text = json.dumps(document, ensure_ascii=chance.random() < 0.5)
    return chance.choice(
        [
            lambda: text,
            lambda: f"\n {json.dumps(document, indent=2)}\n",
            lambda: json.dumps(_changed(chance, document)),
            lambda: json.dumps(_changed(chance, document)),
            lambda: json.dumps(_changed(chance, document)),
            lambda: text[: chance.randrange(len(text))],
            lambda: json.dumps(_changed(chance, document, float("nan"))),
            lambda: json.dumps(_changed(chance, document, float("-inf"))),
            lambda: json.dumps(_changed(chance, document, "HUGE")).replace(
                '"HUGE"', chance.choice(["1e999", "9" * 400, "9" * 5000])
            ),
            lambda: json.dumps(_changed(chance, document, "HALF")).replace("HALF", r"\ud83d"),
            lambda: _with_a_key_twice(text),
            lambda: "[" * 150 + text + "]" * 150,
            lambda: "[" * 100_000,
            lambda: f"Here you are: {text}",
            lambda: f"```json\n{text}\n```",
            lambda: f"{text}\n\nI hope that it helps.",
            lambda: f"{text}{text}",
            lambda: text.replace('"', "'"),
            lambda: f"\ufeff{text}",
            lambda: text.replace("}", ",}").replace("]", ",]"),
            lambda: chance.choice(["", "null", "I cannot do that.", "{}", "[]", "\x00", "0x10", "01", "True"]),
        ]
    )()


def _changed(chance: random.Random, value: Any, other: Any = None) -> Any:
    """The document with another value, a key more, or a key less, somewhere in it."""
    inside = value and isinstance(value, dict | list)
    if inside and chance.random() < 0.7:
        at = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value, list):
            return [*value[:at], _changed(chance, value[at], other), *value[at + 1 :]]
        return {**value, at: _changed(chance, value[at], other)}
    if isinstance(value, dict) and other is None:
        fewer = dict(list(value.items())[1:])
        return chance.choice([{**value, "extra": 1}, {**value, "extra": "1"}, fewer])
    if isinstance(value, list) and other is None:
        return chance.choice([[*value, *value], [*value, 1, 1], value[1:]])
    return chance.choice([1, "1", True, None, 0, 1.5, [value], {"a": value}, -(10**30)]) if other is None else other


def _with_a_key_twice(text: str) -> str:
    """The first object's first key again at its end, with another value."""
    begin = text.find('{"')
    key = json.JSONDecoder().raw_decode(text[begin + 1 :])[0] if begin >= 0 else ""
    return f'{text[: begin + 1]}{json.dumps(key)}: "first", {text[begin + 1 :]}' if begin >= 0 else '{"a": 1, "a": 1}'


def fits(text: str, schema: dict[str, Any]) -> bool:
    """Whether an independent validator accepts a text as JSON that fits: the reference in Python, `jsonschema`."""

    def strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def constant(name: str) -> None:
        raise ValueError(name)

    try:
        data = json.loads(text, object_pairs_hook=strict, parse_constant=constant)
        json.dumps(data, allow_nan=False)  # 1e999 is infinite
        json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair
    except (ValueError, RecursionError):
        return False
    if _depth(data) > 100:
        return False
    kind = jsonschema.Draft202012Validator
    return bool(kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(data))


def _depth(data: Any) -> int:
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)
