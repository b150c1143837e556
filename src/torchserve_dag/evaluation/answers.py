"""An answer as scorers read it: text, or plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Photo, Text, TextChunk


def readable(answer: Any, *, streams: bool) -> Any:
    """Text where the answer is one: chunks that a workflow streams are joined. Else data of JSON; a photo or bytes as
    they are.

    Of several answers of a language model to one prompt (`n`), the first.
    """
    if streams and isinstance(answer, list):
        texts = [_text(chunk) for chunk in answer]
        return "".join(filter(None, texts)) if None not in texts else plain.flatten(answer)
    text = _text(answer)
    if text is not None:
        return text
    return answer if isinstance(answer, Photo | bytes) else plain.flatten(answer)


def at(value: Any, path: str) -> Any:
    """What a dotted path leads to; of a list, what it leads to in each element. Raises LookupError."""
    for name in path.split(".") if path else ():
        value = _field(value, name)
    return value


def _field(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_field(part, name) for part in value]
    if not isinstance(value, Mapping) or name not in value:
        raise LookupError(name)
    return value[name]


def _text(answer: Any) -> str | None:
    """The text of an answer, or of a chunk of one; None for anything else."""
    if isinstance(answer, TextChunk):
        return answer.text if answer.index == 0 else ""
    return answer.text if isinstance(answer, Text) else answer if isinstance(answer, str) else None
