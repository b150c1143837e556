"""What a content type says: which media type, whether that is JSON, and in which charset a text's characters are."""

from __future__ import annotations

import codecs
import re
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

from torchserve_dag.runtime.messages import InputError

FORM = "application/x-www-form-urlencoded"
"""What curl, wget, urllib and axios send unless they are told otherwise, whatever the body is."""
FORM_AS_SENT = "application/vnd.torchserve-dag.form"
"""What the front door writes in place of FORM for TorchServe, which would parse the body as a form."""
SAYS_NOTHING = frozenset({"", "application/octet-stream", "binary/octet-stream", FORM})
"""Media types with which a body's type is detected from the message that the model takes."""

_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s";]+)', re.IGNORECASE)
_CHARSETS = re.compile(  # Python has more, with which a client could make it compute for long
    r"utf-?(?:8|(?:16|32)(?:[bl]e)?)|(?:us-)?ascii|latin-?1|iso-?8859-(?:[1-9]|1[0-6])|(?:windows-|cp)125[0-8]"
    r"|koi8-[ru]|gb(?:2312|k|18030)|big5|shift[_-]jis|euc-(?:jp|kr)|iso-2022-jp"
)

_FORM = re.compile(rb"[\w.~%+*-]+=[^&=\s\"{}<>]*(?:&[\w.~%+*-]+=[^&=\s\"{}<>]*)*", re.ASCII)


def media_of(content_type: str | None) -> str:
    """The media type in lower case, without parameters; empty where there is none."""
    return content_type.partition(";")[0].strip().lower() if content_type else ""


def is_json(media: str) -> bool:
    return media in {"application/json", "text/json"} or (media.startswith("application/") and media.endswith("+json"))


def charset_of(content_type: str | None) -> str | None:
    """The charset that a content type names."""
    found = _CHARSET.search(content_type) if content_type else None
    return found[1] if found else None


def characters(body: bytes, charset: str | None = None) -> str:
    """The characters of a text: in its charset, in UTF-16 where it begins with UTF-16's byte order mark, else in UTF-8.

    A byte order mark is dropped. Raises InputError: 415 for an unknown charset, 400 for bytes that are not in it.
    """
    utf_16 = charset is None and body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name = charset or ("UTF-16" if utf_16 else "UTF-8")
    unknown = InputError(f"The charset {name[:40]} is not known here: send UTF-8.", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    if not _CHARSETS.fullmatch(name.lower()):
        raise unknown
    try:
        return body.decode(name).removeprefix("\ufeff")
    except LookupError:
        raise unknown from None
    except UnicodeDecodeError as error:
        what = f"The text is not {name} (byte {error.start}): send UTF-8, or name its charset in the content type."
        raise InputError(what) from None


def form_fields(body: bytes) -> list[tuple[str, bytes]] | None:
    """The fields of a body of the type FORM; None for a body of which only the type says that it is a form."""
    if not _FORM.fullmatch(body):
        return None
    pairs = (field.replace(b"+", b" ").partition(b"=") for field in body.split(b"&"))
    return [(unquote_to_bytes(name).decode("utf-8", "replace"), unquote_to_bytes(value)) for name, _, value in pairs]
