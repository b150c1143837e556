"""Which JSON Schemas an engine's grammar holds to. What a grammar would leave out in silence is refused by name.

Engines compile schemas with grammar libraries that know a part of the standard (https://json-schema.org/draft/2020-12).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import InputError

TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"})
COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength"})
KNOWN = ANNOTATIONS | COUNTS | {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "anyOf", "$ref", "$defs",
    "definitions",
}  # fmt: skip
MAX_NODES, MAX_DEPTH, MAX_COUNT = 2_000, 40, 10_000
"""Sub-schemas; nesting; the largest count, for each repetition becomes a part of the grammar."""


def check_schema(schema: Mapping[str, Any], where: str = "response_format.json_schema.schema") -> None:
    """Raises InputError, which names the part of the schema that cannot be held to."""
    for nodes, (path, node) in enumerate(_nodes(schema, (), 0), 1):
        place = plain.dotted((where, *path))
        if nodes > MAX_NODES:
            raise InputError(f"{place}: the schema has more than {MAX_NODES:,} parts.")
        if not isinstance(node, Mapping | bool):
            raise InputError(f"{place}: a schema is an object, true or false.")
        if isinstance(node, Mapping):
            _check_node(node, place, schema)


def _check_node(node: Mapping[str, Any], place: str, root: Mapping[str, Any]) -> None:
    if unknown := sorted(node.keys() - KNOWN):
        raise InputError(f"{place}.{unknown[0]}: an answer cannot be held to that; leave it out.")
    types = node.get("type", [])
    for name in types if isinstance(types, list) else [types]:
        if name not in TYPES:
            raise InputError(f"{place}.type: there is no type {str(name)[:40]!r}; known: {', '.join(sorted(TYPES))}.")
    for name in COUNTS & node.keys():
        if type(node[name]) is not int or not 0 <= node[name] <= MAX_COUNT:
            raise InputError(f"{place}.{name}: write a whole number, 0 to {MAX_COUNT:,}.")
    if not isinstance(node.get("enum", [0]), list) or not node.get("enum", [0]):
        raise InputError(f"{place}.enum: write a list with at least one value.")
    required = node.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InputError(f"{place}.required: write a list of names.")
    if unknown := sorted(set(required) - set(node.get("properties", {}))):
        raise InputError(f"{place}.required: there is no property {unknown[0][:40]!r}.")
    if "$ref" in node and _resolved(node["$ref"], root) is None:
        raise InputError(f"{place}.$ref: there is no {str(node['$ref'])[:80]!r} in this schema.")


def _resolved(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a reference names, None if nothing: `#`, or `#/$defs/NAME`."""
    if reference == "#":
        return root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for part in reference[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _nodes(node: Any, path: plain.Path, depth: int) -> Iterator[tuple[plain.Path, Any]]:
    """A schema and those in it, each with its path."""
    if depth > MAX_DEPTH:
        raise InputError(f"{plain.dotted(path)}: the schema is nested more than {MAX_DEPTH} deep.")
    yield path, node
    if not isinstance(node, Mapping):
        return
    for name in ("properties", "$defs", "definitions"):
        members = node.get(name, {})
        if not isinstance(members, Mapping):
            raise InputError(f"{plain.dotted((*path, name))}: write an object of schemas.")
        for key, member in members.items():
            yield from _nodes(member, (*path, name, key), depth + 1)
    for name in ("items", "additionalProperties"):
        if name in node:
            yield from _nodes(node[name], (*path, name), depth + 1)
    branches = node.get("anyOf", [])
    if not isinstance(branches, list):
        raise InputError(f"{plain.dotted((*path, 'anyOf'))}: write a list of schemas.")
    for index, member in enumerate(branches):
        yield from _nodes(member, (*path, "anyOf", index), depth + 1)
