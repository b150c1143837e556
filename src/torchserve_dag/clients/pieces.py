"""The pieces of a streamed answer, out of the chunks that the network makes of them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from torchserve_dag.clients.bodies import answer_as
from torchserve_dag.clients.errors import error_in, unexpected_answer
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import Photo, Text

_FAILURE = b'{"code":'


class Sieve:
    """Lets an HTTP body through, but for the failure that may be its last line, merged with what is before it."""

    def __init__(self) -> None:
        self.held = b""
        """What may be the beginning of a failure; at the body's end it is an ordinary part of it."""

    def sift(self, chunk: bytes) -> Iterator[bytes]:
        """What can be let through now. Raises ServingError, after what was before the failure."""
        data = self.held + chunk
        start = data.rstrip().rfind(b"\n") + 1
        line = data[start:]
        error = error_in(line)
        if error:
            if before := data[:start].removesuffix(b"\n"):  # the newline is the failure's: it makes it a line
                yield before
            raise error
        open_failure = _FAILURE.startswith(line[: len(_FAILURE)]) and not line.endswith(b"\n")
        end = start if open_failure else len(data)
        self.held = data[end:]
        if end:
            yield data[:end]


class Pieces:
    """Reads messages out of chunks: one of each line of JSON, or of text what has come.

    With None or bytes the chunks stay as they are.
    """

    def __init__(self, answer: Any) -> None:
        """Raises TypeError where no such message can be told from the next."""
        if answer is Photo:
            raise TypeError("a stream's pieces are lines of JSON, Text or bytes; nothing tells one Photo from the next")
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
        """What is left when no chunk will come. Raises UnexpectedAnswer."""
        return self._text(b"", last=True) if self._answer is Text else self.read(b"\n" if self._line else b"")

    def _text(self, chunk: bytes, *, last: bool = False) -> list[Any]:
        try:
            text = self._decoder.decode(chunk, last)
        except UnicodeDecodeError as error:
            raise unexpected_answer(f"The answer is not a {plain.name_of(Text)}: {error}.") from None
        return [Text(text)] if text else []
