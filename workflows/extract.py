"""Structured output: a chat → JSON that fits a schema, or a failure; never JSON that does not fit."""

from __future__ import annotations

from typing import Any

from torchserve_dag import Chat, InputError, TextChunk, UnfitAnswerError, check_schema
from workflows.extract_round import Extraction

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "who": {"type": "string", "minLength": 1, "maxLength": 80, "description": "The person's name."},
        "what": {"type": "string", "minLength": 1, "maxLength": 80, "description": "What happens."},
        "day": {"enum": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", None]},
    },
    "required": ["who", "what", "day"],
    "additionalProperties": False,
}
"""What an answer fits where the request has no `response_format`."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}
"""For a request that asks for `json_object`."""

check_schema(SCHEMA, "SCHEMA", validated=True)


def begin(chat: Chat) -> Extraction:
    """Refuses what no answer could have: several answers, tools, log-probabilities, a schema that is not understood."""
    for name, given in (("n", (chat.n or 1) > 1), ("tools", chat.tools), ("logprobs", chat.logprobs)):
        if given:
            raise InputError(f"{name}: an extraction gives one JSON document; leave it out.")
    wanted = chat.response_format
    if wanted is None or wanted.type == "text":
        return Extraction(chat, SCHEMA)
    if wanted.json_schema is None:
        return Extraction(chat, ANY_OBJECT)
    check_schema(wanted.json_schema.schema, validated=True)
    return Extraction(chat, wanted.json_schema.schema)


def document(extraction: Extraction) -> TextChunk:
    """The JSON, as the model wrote it. What does not fit is a failure, 422."""
    if extraction.wrong:
        tries = "" if extraction.rounds == 1 else f" That was try {extraction.rounds}."
        raise UnfitAnswerError(f"{extraction.wrong}{tries}")
    return TextChunk(extraction.answer, finish_reason="stop", usage=extraction.usage, served_by=extraction.served_by)
