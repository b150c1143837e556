"""A request and its answer as plain data, without anything large: as they are kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.engine.answered import AnsweredRequest
from torchserve_dag.runtime.messages import Failure, Text, TextChunk

MAX_TEXT = 20_000
"""How many characters of a text are kept."""


def plain_request(request: AnsweredRequest) -> dict[str, Any]:
    """The message, the answer and the failure, where there are any; the texts of chunks are joined.

    Raises whatever a user's message raises.
    """
    found: dict[str, Any] = {"message": _plain(request.message)}
    answer, chunks = request.answer, request.chunks
    if isinstance(answer, Failure):
        found["failure"] = {"status": answer.status, "type": answer.type, "message": answer.message}
        answer = []
    if chunks or not isinstance(request.answer, Failure):
        found["answer"] = _joined([*chunks, *answer] if chunks else answer)
    return found


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """Plain data with each text as `redact` gives it. Raises whatever `redact` raises; TypeError if it gives none."""

    def text(one: str) -> str:
        given = redact(one)
        if not isinstance(given, str):
            raise TypeError(f"redact gave {type(given).__name__}, not a text")
        return given

    return _with_texts(value, text)


def cut(value: Any) -> Any:
    """Plain data with the first MAX_TEXT characters of each text."""
    return _with_texts(value, lambda text: text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…")


def size_of(value: Any) -> int:
    """About how many characters plain data has as JSON."""
    if isinstance(value, dict):
        return sum(len(name) + size_of(part) + 6 for name, part in value.items()) + 2
    if isinstance(value, list):
        return sum(size_of(part) + 2 for part in value) + 2
    return len(value) + 2 if isinstance(value, str) else 10


def _joined(answer: Any) -> Any:
    """An answer; of a list of texts one text, or one for each of several answers that grew side by side.

    A name may be split between chunks, so only whole texts can be redacted.
    """
    if not isinstance(answer, Sequence) or isinstance(answer, str) or not answer:
        return _plain(answer)
    if not all(isinstance(chunk, str | Text | TextChunk) for chunk in answer):
        return _plain(answer)
    texts: dict[int, str] = {}
    calls: dict[tuple[int, int], dict[str, str]] = {}
    for chunk in answer:
        index = chunk.index if isinstance(chunk, TextChunk) else 0
        texts[index] = texts.get(index, "") + (chunk if isinstance(chunk, str) else chunk.text)
        for call in (chunk.tool_calls or []) if isinstance(chunk, TextChunk) else []:
            known = calls.setdefault((index, call.index or 0), {"name": "", "arguments": ""})
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""
    whole: list[Any] = [
        {"text": text, "tool_calls": its} if (its := _of(index, calls.items())) else text
        for index, text in sorted(texts.items())
    ]
    return whole[0] if len(whole) == 1 else whole


def _of(index: int, calls: Iterable[tuple[tuple[int, int], dict[str, str]]]) -> list[dict[str, str]]:
    return [call for (of, _), call in calls if of == index]


def _plain(value: Any) -> Any:
    return _named(plain.flatten(value))


def _named(value: Any) -> Any:
    """Plain data in which images, bytes and arrays are only named."""
    if isinstance(value, dict):
        return {name: _named(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_named(part) for part in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    return value if value is None or isinstance(value, str | bool | int | float) else f"<{type(value).__name__}>"


def _with_texts(value: Any, text: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {name: _with_texts(part, text) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_texts(part, text) for part in value]
    return text(value) if isinstance(value, str) else value
