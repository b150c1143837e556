"""A model's signature: what it takes and what it answers, as `build.json` says it to hosts, which know no types of it.

`takes` and `answers` are each `{"value": KIND}`, for one value, or `{"fields": {NAME: KIND}}`, for a message with
fields. Of `takes`, `optional` names the fields that a client may leave out. A KIND is one of

    photo, text, bytes      an image file, characters, bytes
    bool, int, float, str   a scalar
    list[KIND]              a list of scalars, or of such lists
    json                    whatever else, as JSON

`language` lists what OpenAI's API at `/v1` may ask of it: `chat`, `completion`, `embedding`, `moderation`.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Any, Literal

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.graph import Graph
from torchserve_dag.runtime.graph.torchserve.nodes import takes_rows
from torchserve_dag.runtime.messages import Chat, Embedding, Moderation, Photo, Prompt, Text, TextChunk

_NAMES = {Photo: "photo", Text: "text", bytes: "bytes", bool: "bool", int: "int", float: "float", str: "str"}
_WHOLE = frozenset({"photo", "text", "bytes", "json"})
"""What lists have no kind of their own for: they are JSON."""
_JSON = "json"
_ASKED = {Chat: "chat", Prompt: "completion"}
_OF_TEXT = {Embedding: "embedding", Moderation: "moderation"}
"""What an answer to a text makes of the model."""
_WRITTEN = frozenset({TextChunk, Text, str})
"""What an answer in words consists of."""


def signature(graph: Graph) -> dict[str, Any]:
    """The entries `takes`, `answers` and `language` of a graph's `build.json`."""
    takes = {"value": "bytes"} if takes_rows(graph) else _takes(graph.request)
    return {"takes": takes, "answers": _answers(graph), "language": _language(graph)}


def _language(graph: Graph) -> list[str]:
    whole = graph.output.values.get("")
    if whole is None:
        return []
    answer = whole.type
    if typing.get_origin(answer) is list:  # of chunks
        (answer,) = typing.get_args(answer)
    if _parts(answer) <= _WRITTEN:
        return sorted(_ASKED[kind] for kind in _parts(graph.request) & _ASKED.keys())
    kind = _OF_TEXT.get(whole.type) if graph.request is Text else None
    return [kind] if kind else []


def _parts(kind: Any) -> set[Any]:
    return set(typing.get_args(kind)) if plain.is_union(kind) else {kind}


def _takes(kind: Any) -> dict[str, Any]:
    fields = _fields(kind)
    if not fields:
        return {"value": _kind(kind)}
    needed = plain.missing(kind, ())
    kinds = {name: _kind(plain.given(field)) for name, field in fields.items()}
    return {"fields": kinds, "optional": [name for name in kinds if name not in needed]}


def _answers(graph: Graph) -> dict[str, Any]:
    values = graph.output.values
    if "" not in values:
        return {"fields": {name: _kind(value.type) for name, value in values.items()}}
    whole = values[""].type
    if graph.streams:  # all chunks in one answer: texts and files in a row, or JSON lines
        (chunk,) = typing.get_args(whole) or (Any,)
        return {"value": {Text: "text", Photo: "bytes", bytes: "bytes"}.get(chunk, _JSON)}
    fields = _fields(whole)
    return {"fields": {name: _kind(field) for name, field in fields.items()}} if fields else {"value": _kind(whole)}


def _fields(kind: Any) -> dict[str, Any]:
    """The types of a message's fields; none of what is one value."""
    return plain.field_types(kind) if dataclasses.is_dataclass(kind) and kind not in {Photo, Text} else {}  # type: ignore[arg-type]


def _kind(kind: Any) -> str:
    if kind in _NAMES:
        return _NAMES[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in {list, tuple}:
        elements = {_kind(part) for part in parts if part is not ...}
        element = elements.pop() if len(elements) == 1 else _JSON
        return _JSON if element in _WHOLE else f"list[{element}]"
    choices: list[Any] = []
    if origin is Literal:
        choices = list(parts)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices = [member.value for member in kind]
    types = {type(choice) for choice in choices}
    return _NAMES.get(types.pop(), _JSON) if len(types) == 1 else _JSON
