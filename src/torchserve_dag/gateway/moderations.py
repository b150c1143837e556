"""`/v1/moderations`: texts judged by the categories of a model."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.gateway import fields
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.messages import Moderation, Text

MAX_TEXTS = 2048


def read(data: dict[str, Any]) -> list[Text]:
    """The texts of a request, of which `model` is taken out. Raises ApiError."""
    fields.drop_neutral(data, {})
    given = data.pop("input", None)
    for name in data:
        fields.unknown(name)
    texts = [_text(one) for one in (given if isinstance(given, list) else [given])]
    if not 1 <= len(texts) <= MAX_TEXTS or None in texts:
        message = f"input: it is a text, or a list of 1 to {MAX_TEXTS:,} texts; photos are not judged here."
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param="input")
    return [Text(text) for text in texts if text is not None]


def _text(given: Any) -> str | None:
    """A text, or OpenAI's part of the type `text`; None for anything else."""
    if isinstance(given, dict) and given.get("type") == "text" and given.keys() == {"type", "text"}:
        given = given["text"]
    return given if isinstance(given, str) else None


def whole(request_id: str, model: str, found: Sequence[Moderation]) -> dict[str, Any]:
    """The verdicts, with the model's own categories: those of OpenAI's that it does not judge are not there."""
    return {"id": f"modr-{request_id}", "model": model, "results": [_written(one) for one in found]}


def _written(verdict: Moderation) -> dict[str, Any]:
    return {
        "flagged": verdict.flagged,
        "categories": verdict.categories,
        "category_scores": verdict.category_scores,
        "category_applied_input_types": {name: ["text"] for name in verdict.categories},
    }
