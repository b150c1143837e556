"""The parts of a form (`multipart/form-data`, RFC 7578), read by `python-multipart`, the parser of Starlette."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from torchserve_dag.runtime.worker.protocol import Part

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 1000
_FILE = re.compile(rb";\s*filename\*?\s*=", re.IGNORECASE)
"""In the header of a part that is a file. The parser drops the name if it is encoded (RFC 8187)."""


class FormError(ValueError):
    """A form that cannot be read: its message is a sentence for the client."""


def is_form(content_type: str | None) -> bool:
    return content_type is not None and content_type.lstrip()[:10].lower() == "multipart/"


def parts_of(body: bytes, content_type: str) -> list[Part]:
    """The parts of a form, in their order. Raises FormError."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise FormError("The form's content type names no boundary: let the client library write it.")
    reader = _Reader()
    parser = MultipartParser(boundary, reader.callbacks())
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise FormError(f"The form cannot be read: {error}.") from None
    if not reader.ended:
        raise FormError("The form has no end: the client sent a part of it.")
    return reader.parts


class _Reader:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._name, self._value = bytearray(), bytearray()
        self._headers: dict[str, bytes] = {}
        self._content = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._form_ends,
        }

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise FormError(f"The form has more than {MAX_PARTS:,} parts.")
        self._headers, self._content = {}, bytearray()

    def _header_ends(self) -> None:
        self._headers[self._name.decode("latin-1").lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        disposition = self._headers.get("content-disposition", b"")
        _, options = parse_options_header(disposition)
        if (name := options.get(b"name")) is None:
            raise FormError("A part of the form has no name.")
        kind = None  # TorchServe drops the content type of a field that is no file
        if _FILE.search(disposition):
            kind = self._headers.get("content-type", b"application/octet-stream").decode("latin-1")
        self.parts.append(Part(name.decode("utf-8", "replace"), bytes(self._content), kind))

    def _form_ends(self) -> None:
        self.ended = True
