"""Reads a document: its bytes to sections of text."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from torchserve_dag.retrieval import html, markdown
from torchserve_dag.retrieval.documents import DocumentError, Kind
from torchserve_dag.retrieval.sections import Section

MAX_CHARACTERS = 8_000_000
"""Of a document's text: some 10,000 passages."""
MAX_PAGES = 5_000

_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w-]{1,40})", re.IGNORECASE)
_HEAD = 4_096
"""The bytes of a page in which its character set must stand."""


def read(path: Path, name: str, kind: Kind) -> list[Section]:
    """A document's sections. Raises DocumentError, with `name`, for one that cannot be read."""
    try:
        if kind == "pdf":
            sections = _pdf(path, name)
        else:
            text = _decoded(path.read_bytes(), name, kind)
            sections = {"markdown": markdown.sections, "html": html.sections, "text": _whole}[kind](text)
    except OSError as error:
        raise DocumentError(f"{name} cannot be read: {error.strerror or error}.") from None
    if not sections:
        more = ": scanned pages must be turned into text first" if kind == "pdf" else ""
        raise DocumentError(f"{name} has no text{more}.")
    if (count := sum(len(section.text) for section in sections)) > MAX_CHARACTERS:
        limit = f"{MAX_CHARACTERS:,}: split it into several documents"
        raise DocumentError(f"{name} has {count:,} characters of text, and the limit is {limit}.")
    return sections


def _whole(text: str) -> list[Section]:
    return [Section(text, "", 0, 1)] if text.strip() else []


def _decoded(body: bytes, name: str, kind: Kind) -> str:
    mark = next((mark for mark in _MARKS if body.startswith(mark)), b"")
    charset = _CHARSET.search(body[:_HEAD]) if kind == "html" and not mark else None
    encoding = charset[1].decode() if charset else _MARKS.get(mark, "utf-8")
    try:
        text = body[len(mark) :].decode(encoding)
    except (UnicodeDecodeError, LookupError):
        text = "\0"
    if "\0" in text:
        raise DocumentError(f"{name} is no text in {encoding.upper()}: convert it, or give it another suffix.")
    return text


def _pdf(path: Path, name: str) -> list[Section]:
    """A section for each page. Raises DocumentError for what pypdf cannot read."""
    from pypdf import PasswordType, PdfReader  # noqa: PLC0415 (only where there is a PDF)

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise DocumentError(f"{name} is encrypted: save it without its password.")  # noqa: TRY301
        pages = len(reader.pages)
        if pages > MAX_PAGES:
            what = f"{pages:,} pages, and the limit is {MAX_PAGES:,}: split it into several documents"
            raise DocumentError(f"{name} has {what}.")  # noqa: TRY301
        texts = [page.extract_text() for page in reader.pages]
    except (DocumentError, OSError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 (a broken file makes pypdf raise whatever its place leads to)
        raise DocumentError(f"{name} is no PDF that can be read: {error or type(error).__name__}.") from None
    sections, begin = list[Section](), 0
    for number, text in enumerate(texts, 1):
        if text.strip():
            sections.append(Section(text, "", begin, 1, number))
        begin += len(text) + 1
    return sections
