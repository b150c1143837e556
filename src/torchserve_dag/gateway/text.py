"""What a model answers, as chunks of text and what they have cost, whether it streams or not."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from http import HTTPStatus
from typing import Any

from torchserve_dag.gateway.call import BrokenAnswerError, ModelAnswer
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.runtime.data import codec, plain
from torchserve_dag.runtime.data.options import WITH_USAGE
from torchserve_dag.runtime.messages import Failure, TextChunk, Usage

JSON_LINES = "application/x-ndjson"
MAX_LINE = 8 * 2**20
"""In bytes; an answer has at most 6.5 MB."""


class TextAnswer:
    """A model's answer in words."""

    def __init__(self, answer: ModelAnswer) -> None:
        self.usage: Usage | None = None
        """What it has cost, once it is complete; None if the model does not say."""
        self._answer = answer

    async def chunks(self) -> AsyncGenerator[list[TextChunk], None]:
        """Its chunks, those together that came together. Raises ApiError, also where the answer breaks off."""
        await check(self._answer)
        if self._answer.headers.get("content-type", "").startswith(JSON_LINES):
            async for lines in _lines(self._answer):
                chunks, failure = self._read(lines)
                if chunks:
                    yield chunks
                if failure:
                    raise failure
            if self.usage is None:  # which a stream ends with: TorchServe ends that of a killed worker in good order
                raise BrokenAnswerError
            return
        said = read_json(await self._answer.whole())
        yield [_chunk(one) for one in (said if isinstance(said, list) else [said])]
        self.usage = read_usage(self._answer)

    def _read(self, lines: Sequence[bytes]) -> tuple[list[TextChunk], ApiError | None]:
        """The chunks in some lines, as far as they go; and the failure that ends them."""
        chunks: list[TextChunk] = []
        for line in lines:
            try:
                said = read_json(line)
                if isinstance(said, dict) and "usage" in said and "text" not in said:
                    self.usage = _usage(said["usage"])
                elif failure := codec.failure_in(line):
                    return chunks, ApiError.of(failure)
                else:
                    chunks.append(_chunk(said))
            except ApiError as error:
                return chunks, error
        return chunks, None


async def check(answer: ModelAnswer) -> None:
    """Raises ApiError if the answer is a failure."""
    if answer.status == HTTPStatus.OK:
        return
    failure = codec.failure_in(await answer.whole())
    headers = {name: answer.headers[name] for name in ("retry-after",) if name in answer.headers}
    raise ApiError.of(failure or Failure(answer.status, f"The model answered {answer.status}."), headers)


async def _lines(answer: ModelAnswer) -> AsyncIterator[list[bytes]]:
    left = b""
    async for part in answer.parts():
        *lines, left = (left + part).split(b"\n")
        if len(left) > MAX_LINE:
            raise _unreadable()
        if found := [line for line in lines if line.strip()]:
            yield found
    if left.strip():
        yield [left]


def read_usage(answer: ModelAnswer) -> Usage | None:
    """What an answer that is no stream has cost; None if the model does not say. Raises ApiError."""
    said = answer.headers.get(WITH_USAGE)
    return _usage(read_json(said.encode())) if said else None


def read_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _unreadable() from None


def _chunk(said: Any) -> TextChunk:
    try:
        return TextChunk(said) if isinstance(said, str) else plain.build(TextChunk, said)
    except plain.WrongDataError:
        raise _unreadable() from None


def _usage(said: Any) -> Usage:
    try:
        return plain.build(Usage, said)
    except plain.WrongDataError:
        raise _unreadable() from None


def _unreadable() -> ApiError:
    return ApiError(HTTPStatus.BAD_GATEWAY, "The model's answer is no text.", code="unreadable_answer")
