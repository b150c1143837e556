"""An answer as it leaves a worker: a body, a status and headers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import responses
from typing import Any

from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.messages import Failure, Text

logger = logging.getLogger(__name__)

MAX_BYTES = 6_553_500
"""TorchServe's default `max_response_size`: a larger answer ends the worker, and all that is inside it."""

LINES = "application/x-ndjson"
PLAIN = "text/plain; charset=utf-8"

CANNOT_BE_WRITTEN = Failure(HTTPStatus.INTERNAL_SERVER_ERROR, "The answer cannot be written.", "InternalError")


@dataclass(frozen=True, slots=True)
class Reply:
    body: bytes
    content_type: str = "application/json"
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        return responses.get(self.status, "Failed")


def reply(answer: Any, request_id: str | None) -> Reply:
    """A whole answer, or a failure."""
    if isinstance(answer, Failure):
        body = json.dumps(codec.failure_fields(answer, request_id)).encode()
        return Reply(body, status=answer.status, headers=_wait(answer))
    try:
        body, content_type = codec.encode(answer)
    except Exception:
        logger.exception("request %s: the answer cannot be written", request_id)
        return reply(CANNOT_BE_WRITTEN, request_id)
    return Reply(body, content_type) if len(body) <= MAX_BYTES else reply(too_large(len(body)), request_id)


def piece(message: Any) -> Reply:
    """A piece of an answer: text as it is, bytes and photos likewise, everything else as a line of JSON.

    Raises what its encoding raises, and ValueError for one that is too large.
    """
    if isinstance(message, Text):
        found = Reply(message.text.encode(), PLAIN)
    else:
        body, content_type = codec.encode(message)
        found = Reply(body + b"\n", LINES) if content_type == "application/json" else Reply(body, content_type)
    if len(found.body) > MAX_BYTES:
        raise ValueError(too_large(len(found.body)).message)
    return found


def joined(messages: Iterable[Any], request_id: str | None) -> Reply:
    """An answer in pieces, for a client that takes it whole."""
    try:
        pieces = [piece(message) for message in messages]
    except Exception:
        logger.exception("request %s: a piece cannot be written", request_id)
        return reply(CANNOT_BE_WRITTEN, request_id)
    body = b"".join(one.body for one in pieces)
    if len(body) > MAX_BYTES:
        return reply(too_large(len(body)), request_id)
    return Reply(body, pieces[0].content_type if pieces else LINES)


def failed_piece(failure: Failure, request_id: str | None) -> bytes:
    """What ends an answer in the middle: the failure, on a line of its own."""
    return b"\n" + json.dumps(codec.failure_fields(failure, request_id)).encode() + b"\n"


def too_large(size: int) -> Failure:
    message = f"The answer is {size:,} bytes; the limit is {MAX_BYTES:,}."
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "AnswerTooLarge")


def _wait(failure: Failure) -> dict[str, str]:
    return {"Retry-After": "1"} if failure.type == "Overloaded" else {}
