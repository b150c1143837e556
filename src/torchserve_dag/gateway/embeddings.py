"""`/v1/embeddings`: texts as vectors, as lists of numbers or in base64."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from torchserve_dag.gateway import fields
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.messages import Embedding, Text, Usage

MAX_TEXTS = 2048


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of a request, and how their vectors are to be written."""

    input: list[Text]
    encoding_format: Literal["float", "base64"] = "float"


def read(data: dict[str, Any]) -> Texts:
    """The texts of a request, of which `model` is taken out. Raises ApiError."""
    fields.drop_neutral(data, {})
    given = data.get("input")
    texts = given if isinstance(given, list) else [given]
    if not 1 <= len(texts) <= MAX_TEXTS or not all(isinstance(text, str) and text for text in texts):
        message = f"input: it is a text, or a list of 1 to {MAX_TEXTS:,} texts, none empty; tokens are not read."
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param="input")
    return fields.message_of(Texts, {**data, "input": [{"text": text} for text in texts]})


def whole(model: str, found: Sequence[Embedding], usage: Usage, encoding_format: str) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": at, "embedding": _written(one.embedding, encoding_format)}
        for at, one in enumerate(found)
    ]
    tokens = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens}
    return {"object": "list", "data": data, "model": model, "usage": tokens}


def _written(vector: list[float], encoding_format: str) -> list[float] | str:
    """A vector as it is, or as base64 of 32-bit floats, the least significant byte first."""
    if encoding_format == "float":
        return vector
    floats = array.array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return base64.b64encode(floats.tobytes()).decode()
