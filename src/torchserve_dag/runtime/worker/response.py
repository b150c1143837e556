"""Answers as a worker's responses: a body, a status and headers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.messages import Failure, Text, Usage
from torchserve_dag.runtime.worker.protocol import ServiceResponse

logger = logging.getLogger(__name__)

MAX_BYTES = 6_553_500
"""TorchServe's default `max_response_size`: a larger answer ends the worker with all its requests."""

JSON_LINES = "application/x-ndjson"
PLAIN_TEXT = "text/plain; charset=utf-8"

Named = Callable[[plain.Path], tuple[plain.Path, str | None]]
"""The name that a part of an answer has for its reader, and the node that gave it."""


def write_answer(answer: Any, request_id: str, named: Named = lambda path: (path, None)) -> ServiceResponse:
    """The response with a whole answer; a failure if the answer is one, cannot be encoded, or is too large."""
    if isinstance(answer, Failure):
        return write_failure(answer, request_id)
    try:
        body, content_type = codec.encode(answer)
    except Exception as error:  # noqa: BLE001 (Pillow's, too)
        return write_failure(unwritten(error, request_id, named), request_id)
    if len(body) > MAX_BYTES:
        return write_failure(too_large(len(body)), request_id)
    return ServiceResponse(body, content_type)


def unwritten(error: Exception, request_id: str, named: Named) -> Failure:
    """The failure of an answer that cannot be encoded, with the part of it that cannot; it is logged, too."""
    path, node = named(error.path if isinstance(error, plain.UnwritableError) else ())
    fault = ""
    if isinstance(error, plain.UnwritableError):
        message = f"The answer cannot be written: {plain.UnwritableError(path, error.what)}."
        logger.error("request %s: %s", request_id, message)
    else:
        message = f"The answer cannot be written: {plain.dotted(path) or 'it'} raised {type(error).__name__}."
        fault = logs.report(logger, error, f"request {request_id}: {message}")
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "InternalError", node, fault)


def write_failure(failure: Failure, request_id: str) -> ServiceResponse:
    body = json.dumps(codec.failure_fields(failure, request_id)).encode()
    headers = {"Retry-After": "1"} if failure.type == "Overloaded" else {}
    return ServiceResponse(body, status=failure.status, headers=headers)


def write_chunk(message: Any, *, in_lines: bool = False) -> tuple[bytes, str]:
    """A chunk's body and content type: text, bytes and photos as they are, everything else as a line of JSON.

    `in_lines`: a text is a line of JSON, too.

    Raises whatever encoding raises, and ValueError for a chunk that is too large.
    """
    if isinstance(message, Text) and not in_lines:
        body, content_type = message.text.encode(), PLAIN_TEXT
    else:
        body, content_type = codec.encode(message)
        if content_type == "application/json":
            body, content_type = body + b"\n", JSON_LINES
    if len(body) > MAX_BYTES:
        raise ValueError(too_large(len(body)).message)
    return body, content_type


def usage_line(usage: Usage) -> bytes:
    """The last line of an answer in lines, for a client that asked for the usage."""
    return b'{"usage": ' + plain.to_json(usage) + b"}\n"


def write_joined(
    messages: Iterable[Any], request_id: str, named: Named = lambda path: (path, None), *, in_lines: bool = False
) -> ServiceResponse:
    """All chunks of an answer in one response, for a client that does not accept chunks."""
    chunks: list[tuple[bytes, str]] = []
    try:
        chunks.extend(write_chunk(message, in_lines=in_lines) for message in messages)
    except Exception as error:  # noqa: BLE001 (Pillow's, too)
        wrong = error.at(len(chunks)) if isinstance(error, plain.UnwritableError) else error
        return write_failure(unwritten(wrong, request_id, named), request_id)
    body = b"".join(chunk for chunk, _ in chunks)
    if len(body) > MAX_BYTES:
        return write_failure(too_large(len(body)), request_id)
    return ServiceResponse(body, chunks[0][1] if chunks else JSON_LINES)


def write_failure_after_chunks(failure: Failure, request_id: str) -> ServiceResponse:
    """The end of an answer that fails after its first chunks: the failure, on a line of its own."""
    line = json.dumps(codec.failure_fields(failure, request_id)).encode()
    return ServiceResponse(b"\n" + line + b"\n", status=failure.status)


def too_large(size: int) -> Failure:
    message = f"The answer is {size:,} bytes; the limit is {MAX_BYTES:,}."
    return Failure(HTTPStatus.INTERNAL_SERVER_ERROR, message, "AnswerTooLarge")
