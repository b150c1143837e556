"""HTTP/1.1 answers, parsed by httptools from whatever chunks the network makes of them."""

from __future__ import annotations

from http import HTTPStatus
from typing import NamedTuple

import httptools


class HttpAnswer(NamedTuple):
    status: int
    content: bytes
    keep_alive: bool
    """Whether the connection may be used again."""


class AnswerReader:
    """The answers of one connection, to requests that are sent one at a time.

    The content of an answer has a length, comes in chunks, or lasts until the connection closes.
    """

    def __init__(self) -> None:
        self.begun = False
        """Whether some of an answer has come."""
        self._content: list[bytes] = []
        self._read_head = False
        self._delimited = False
        """Whether the answer says where its content ends."""
        self._answer: HttpAnswer | None = None
        self.on_body = self._content.append
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes | memoryview) -> HttpAnswer | None:
        """The answer, if `data` completes it. Raises ValueError for what is not HTTP."""
        self.begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise ValueError(f"the answer is not HTTP/1.1 ({error})") from None
        answer, self._answer = self._answer, None
        return answer

    def closed(self) -> HttpAnswer | None:
        """The answer that the end of the connection completes, if it does."""
        if self._read_head and not self._delimited:
            return HttpAnswer(self._parser.get_status_code(), b"".join(self._content), keep_alive=False)
        return None

    # What the parser calls.

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in {b"content-length", b"transfer-encoding"}:
            self._delimited = True

    def on_headers_complete(self) -> None:
        self._read_head = True

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= HTTPStatus.OK:  # 100 Continue has no content: the answer follows
            self._answer = HttpAnswer(status, b"".join(self._content), self._parser.should_keep_alive())
            self.begun = False
        self._content.clear()
        self._read_head = self._delimited = False
