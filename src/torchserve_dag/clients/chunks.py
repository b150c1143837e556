"""A streamed answer: messages read from the chunks that the network cuts it into."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from torchserve_dag.clients.bodies import answer_as
from torchserve_dag.clients.errors import error_in, unexpected_answer
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Photo, Text

_FAILURE = b'{"code":'


class FailureFilter:
    """Passes an HTTP body on, and raises a failure in its last line, which may share a chunk with what precedes it."""

    def __init__(self) -> None:
        self.held = b""
        """Bytes held back because they may begin a failure; at the body's end they turn out to be ordinary content."""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The bytes that can be passed on now. Raises the failure as ServingError, after the bytes before it."""
        data = self.held + chunk
        start = data.rstrip().rfind(b"\n") + 1
        line = data[start:]
        error = error_in(line)
        if error:
            # The newline before a failure belongs to it.
            if before := data[:start].removesuffix(b"\n"):
                yield before
            raise error
        open_failure = _FAILURE.startswith(line[: len(_FAILURE)]) and not line.endswith(b"\n")
        end = start if open_failure else len(data)
        self.held = data[end:]
        if end:
            yield data[:end]


class MessageReader:
    """Reads messages from chunks: one for each line of JSON; for Text, one with the text of each chunk.

    For None or bytes the chunks stay as they are.
    """

    def __init__(self, answer: Any) -> None:
        """Raises TypeError for Photo, because nothing marks where a photo ends."""
        if answer is Photo:
            raise TypeError("a stream holds lines of JSON, Text or bytes; nothing tells one Photo from the next")
        self._answer = answer
        self._line = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read(self, chunk: bytes) -> list[Any]:
        """The messages that a chunk completes. Raises UnexpectedAnswer."""
        if self._answer in {None, bytes}:
            return [chunk] if chunk else []
        if self._answer is Text:
            return self._text(chunk)
        *lines, self._line = (self._line + chunk).split(b"\n")
        return [answer_as(self._answer, line) for line in lines if line.strip()]

    def end(self) -> list[Any]:
        """The messages that the end of the stream completes. Raises UnexpectedAnswer."""
        return self._text(b"", last=True) if self._answer is Text else self.read(b"\n" if self._line else b"")

    def _text(self, chunk: bytes, *, last: bool = False) -> list[Any]:
        try:
            text = self._decoder.decode(chunk, last)
        except UnicodeDecodeError as error:
            raise unexpected_answer(f"The answer is not a {plain.name_of(Text)}: {error}.") from None
        return [Text(text)] if text else []
