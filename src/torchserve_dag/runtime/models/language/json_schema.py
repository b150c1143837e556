"""Which JSON Schemas an answer can be held to. What would be left out in silence is refused by name.

Engines compile schemas with grammar libraries that know a part of the standard (https://json-schema.org/draft/2020-12).
An answer that is validated too may be held to more of it: see json_answer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import InputError

TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"})
COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength"})
IN_GRAMMARS = ANNOTATIONS | COUNTS | {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "anyOf", "$ref", "$defs",
    "definitions",
}  # fmt: skip
PROPERTY_COUNTS = frozenset({"minProperties", "maxProperties"})
LIMITS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
FORMATS = ("date", "date-time", "uuid")
VALIDATED = IN_GRAMMARS | PROPERTY_COUNTS | LIMITS | {"allOf", "oneOf", "uniqueItems", "format"}
SCHEMAS_BY_NAME = ("properties", "$defs", "definitions")
BRANCHES = ("anyOf", "allOf", "oneOf")
MAX_NODES, MAX_DEPTH, MAX_COUNT = 2_000, 40, 10_000
"""Sub-schemas; nesting; the largest count, for each repetition becomes a part of the grammar."""


def check_schema(
    schema: Mapping[str, Any], where: str = "response_format.json_schema.schema", *, validated: bool = False
) -> None:
    """Raises InputError, which names the part of the schema that an answer cannot be held to.

    `validated`: whether the answer is validated, and so may be held to more than a grammar can.
    """
    found: dict[plain.Path, Mapping[str, Any]] = {}
    for nodes, (path, node) in enumerate(_nodes(schema, (), 0), 1):
        place = plain.dotted((where, *path))
        if nodes > MAX_NODES:
            raise InputError(f"{place}: the schema has more than {MAX_NODES:,} parts.")
        if not isinstance(node, Mapping | bool):
            raise InputError(f"{place}: a schema is an object, true or false.")
        if node is False and path[-1:] not in {("items",), ("additionalProperties",)}:
            raise InputError(f"{place}: no value fits false; leave it out.")
        if isinstance(node, Mapping):
            _check_node(node, place, VALIDATED if validated else IN_GRAMMARS)
            found[path] = node
    _check_references(found, where)


def _check_references(found: Mapping[plain.Path, Mapping[str, Any]], where: str) -> None:
    in_place: dict[int, list[int]] = {}
    """Each schema → those that are about the same value, by their ids."""
    for path, node in found.items():
        target = _resolved(node["$ref"], found) if "$ref" in node else None
        if "$ref" in node and target is None:
            place = plain.dotted((where, *path))
            raise InputError(f"{place}.$ref: there is no {str(node['$ref'])[:80]!r} in this schema.")
        branches = [branch for name in BRANCHES for branch in node.get(name, ())]
        in_place[id(node)] = [id(other) for other in (*branches, target) if isinstance(other, Mapping)]
    try:
        TopologicalSorter(in_place).prepare()
    except CycleError:
        raise InputError(f"{where}: a $ref leads back to itself before any value.") from None


def in_grammars(schema: Any) -> Any:
    """A checked schema without what grammars leave out, so that an engine can be asked to hold to the rest."""
    if not isinstance(schema, Mapping):
        return schema
    kept = {name: part for name, part in schema.items() if name in IN_GRAMMARS}
    for name in SCHEMAS_BY_NAME:
        if name in kept:
            kept[name] = {key: in_grammars(member) for key, member in kept[name].items()}
    for name in ("items", "additionalProperties"):
        if name in kept:
            kept[name] = in_grammars(kept[name])
    if "anyOf" in kept:
        kept["anyOf"] = [in_grammars(member) for member in kept["anyOf"]]
    return kept


def resolve(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference of a checked schema names: `#`, or `#/$defs/NAME`."""
    found: Any = root
    for part in _parts(reference) or ():
        found = found[part]
    return found


def _check_node(node: Mapping[str, Any], place: str, known: frozenset[str]) -> None:
    if unknown := sorted(str(name) for name in node.keys() - known):
        raise InputError(f"{place}.{unknown[0][:40]}: an answer cannot be held to that; leave it out.")
    _check_numbers(node, place)
    types = node.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if not isinstance(name, str) or name not in TYPES:
            raise InputError(f"{place}.type: there is no type {str(name)[:40]!r}; known: {', '.join(sorted(TYPES))}.")
    if not isinstance(node.get("enum", [0]), list) or not node.get("enum", [0]):
        raise InputError(f"{place}.enum: write a list with at least one value.")
    required = node.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InputError(f"{place}.required: write a list of names.")
    if unknown := sorted(set(required) - set(node.get("properties", {}))):
        raise InputError(f"{place}.required: there is no property {unknown[0][:40]!r}.")
    if node.get("format", "date") not in FORMATS:
        raise InputError(f"{place}.format: an answer can be held to {', '.join(FORMATS)}; leave it out.")


def _check_numbers(node: Mapping[str, Any], place: str) -> None:
    for name in (COUNTS | PROPERTY_COUNTS) & node.keys():
        if type(node[name]) is not int or not 0 <= node[name] <= MAX_COUNT:
            raise InputError(f"{place}.{name}: write a whole number, 0 to {MAX_COUNT:,}.")
    for name in LIMITS & node.keys():
        if type(node[name]) not in {int, float}:
            raise InputError(f"{place}.{name}: write a number.")
    if not isinstance(node.get("uniqueItems", False), bool):
        raise InputError(f"{place}.uniqueItems: write true or false.")


def _resolved(reference: Any, found: Mapping[plain.Path, Any]) -> Any:
    """The schema that a reference names, None if it names none."""
    parts = _parts(reference)
    return None if parts is None else found.get(parts)


def _parts(reference: Any) -> plain.Path | None:
    """The path that a reference names, None if it leads out of the schema."""
    if reference == "#":
        return ()
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in reference[2:].split("/"))


def _nodes(node: Any, path: plain.Path, depth: int) -> Iterator[tuple[plain.Path, Any]]:
    """A schema and those in it, each with its path."""
    if depth > MAX_DEPTH:
        raise InputError(f"{plain.dotted(path)}: the schema is nested more than {MAX_DEPTH} deep.")
    yield path, node
    if not isinstance(node, Mapping):
        return
    for name in ("items", "additionalProperties"):
        if name in node:
            yield from _nodes(node[name], (*path, name), depth + 1)
    for name in (*SCHEMAS_BY_NAME, *BRANCHES):
        if name not in node:
            continue
        members, kind = node[name], Mapping if name in SCHEMAS_BY_NAME else list
        if not isinstance(members, kind) or (name in BRANCHES and not members):
            what = "an object" if name in SCHEMAS_BY_NAME else "a list"
            raise InputError(f"{plain.dotted((*path, name))}: write {what} of schemas.")
        for key, member in members.items() if isinstance(members, Mapping) else enumerate(members):
            yield from _nodes(member, (*path, name, key), depth + 1)
